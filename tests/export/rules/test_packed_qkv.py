"""One packed tensor fed to GroupQueryAttention."""

import numpy as np
import onnx_ir as ir
import pytest
from rule_graphs import B, Graph, T, assert_close, rewrite

from gptopt.export.rules.packed_qkv import RULE

H, K, D = 4, 2, 8
WIDE = (H + 2 * K) * D


def build(order=(0, 1, 2), read=False):
    g = Graph()
    x = g.input("x", ["B", "T", WIDE])
    past = [g.input(name, ["B", K, "P", D]) for name in ("k", "v")]
    last = g.input("last", ["B"], ir.DataType.INT32)
    total = g.input("total", [], ir.DataType.INT32)
    sizes = g.weight(np.array([H * D, K * D, K * D]))
    parts = g.node("Split", x, sizes, axis=2, outputs=3)
    for part, width in zip(parts, (H * D, K * D, K * D), strict=True):
        part.shape = ir.Shape(["B", "T", width])
    out = g.node(
        "GroupQueryAttention", *(parts[i] for i in order), *past, last, total, outputs=3,
        domain="com.microsoft", num_heads=H, kv_num_heads=K,
    )  # fmt: skip
    return g.model(*out, *([parts[0]] if read else []))


@pytest.fixture
def given():
    random = np.random.default_rng(2)
    return {
        "x": random.standard_normal((B, T, WIDE)).astype(np.float32),
        "k": np.zeros((B, K, 0, D), np.float32),
        "v": np.zeros((B, K, 0, D), np.float32),
        "last": np.full(B, T - 1, np.int32),
        "total": np.array(T, np.int32),
    }


def test_the_operator_cuts_the_tensor_itself(given):
    count, before, after, kinds, _ = rewrite(RULE, build(), given)
    assert (count, kinds) == (1, ["GroupQueryAttention"])
    assert_close(before, after)


def test_parts_in_another_order_are_not_packed(given):
    count, before, after, _, _ = rewrite(RULE, build(order=(0, 2, 1)), given)
    assert count == 0
    assert_close(before, after)


def test_parts_that_others_read_are_left_alone_with_a_reason(given):
    count, _, _, _, notes = rewrite(RULE, build(read=True), given)
    assert count == 0
    assert "something else reads" in notes[0].reason
