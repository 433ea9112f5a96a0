"""The rotation inside GroupQueryAttention."""

import numpy as np
import onnx_ir as ir
import pytest
from random_models import build_of, random_gpt
from rule_graphs import B, Graph, T, assert_close, rewrite

from gptopt.export import prove
from gptopt.export.bisect import locate
from gptopt.export.pipeline import build_graph
from gptopt.export.rules.rotary_gqa import BLOCK_SIZE, RULE
from gptopt.export.targets import ORT_CPU, PORTABLE

H, K, D, M = 4, 2, 16, 24
LLAMA = {
    "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "bias": False,
    "n_embd": 64, "block_size": 48,
}  # fmt: skip


def build(pairs=D // 2, other=False, mask=False, read=False):
    g = Graph()
    kind = ir.DataType.INT64
    q, k, v = (g.input(n, ["B", "T", h * D]) for n, h in (("q", H), ("k", K), ("v", K)))
    past = [g.input(name, ["B", K, "P", D]) for name in ("pk", "pv")]
    last = g.input("last", ["B"], ir.DataType.INT32)
    total = g.input("total", [], ir.DataType.INT32)
    positions = g.input("position_ids", ["B", "T"], kind)
    ids = g.input("input_ids", ["B", "T"], kind)
    given = g.input("attention_mask", ["B", "T"], kind)
    places = g.node("Mul", positions, given) if mask else positions
    angles = g.node("Cast", g.node("Unsqueeze", places, g.weight(np.array([2]))), to=1)
    steps = (0.5 ** np.arange(pairs)).astype(np.float32)
    angles = g.node("Mul", angles, g.weight(steps), shape=("B", "T", pairs))
    tables = [
        g.node("Reshape", g.node(op, angles), g.weight(np.array([-1, pairs])), shape=(None, pairs))
        for op in ("Cos", "Sin")
    ]
    sizes = g.node("Shape", ids)
    count = g.node("ReduceProd", sizes, keepdims=0)
    zero, one = g.weight(np.array(0)), g.weight(np.array(1))
    numbers = g.node("Reshape", g.node("Range", zero, count, one), sizes)
    part = {"rotary_embedding_dim": 2 * pairs} if pairs < D // 2 else {}
    turned = [
        g.node(
            "RotaryEmbedding", x, numbers, *(tables[::-1] if other and x is k else tables),
            shape=("B", "T", heads * D), domain="com.microsoft",
            **({"num_heads": heads, **part} if part else {}),
        )
        for x, heads in ((q, H), (k, K))
    ]  # fmt: skip
    out = g.node(
        "GroupQueryAttention", *turned, v, *past, last, total, outputs=3,
        domain="com.microsoft", num_heads=H, kv_num_heads=K,
    )  # fmt: skip
    for node in g.nodes:
        if node.op_type not in ("RotaryEmbedding", "GroupQueryAttention"):
            node.outputs[0].type = None  # onnxruntime finds it: half of them are integers
    model = g.model(*out, *([turned[0]] if read else []))
    model.graph.meta[BLOCK_SIZE] = M
    return model


@pytest.fixture
def given():
    """Row 0 has 5 tokens in its cache, row 1 has 2."""
    random = np.random.default_rng(2)
    cached, P = np.array([5, 2]), 5
    feeds = {
        name: random.standard_normal((B, 1, heads * D)).astype(np.float32)
        for name, heads in (("q", H), ("k", K), ("v", K))
    }
    past = random.standard_normal((2, B, K, P, D)).astype(np.float32)
    return feeds | {
        "pk": past[0], "pv": past[1], "last": cached.astype(np.int32),
        "total": np.array(P + 1, np.int32), "position_ids": cached[:, None],
        "input_ids": np.zeros((B, 1), np.int64), "attention_mask": np.ones((B, 1), np.int64),
    }  # fmt: skip


def test_the_operator_turns_ragged_rows_by_itself(given):
    count, before, after, kinds, _ = rewrite(RULE, build(), given)
    assert (count, kinds) == (1, ["GroupQueryAttention"])
    assert_close(before[:1], after[:1])
    # The columns behind a row's own tokens are nobody's.
    assert_close([before[1][0], before[1][1, :, :3]], [after[1][0], after[1][1, :, :3]])


def test_a_prompt_is_turned_too(given):
    random = np.random.default_rng(3)
    for name, heads in (("q", H), ("k", K), ("v", K)):
        given[name] = random.standard_normal((B, T, heads * D)).astype(np.float32)
    given |= {
        "pk": np.zeros((B, K, 0, D), np.float32), "pv": np.zeros((B, K, 0, D), np.float32),
        "last": np.full(B, T - 1, np.int32), "total": np.array(T, np.int32),
        "position_ids": np.tile(np.arange(T), (B, 1)), "input_ids": np.zeros((B, T), np.int64),
        "attention_mask": np.ones((B, T), np.int64),
    }  # fmt: skip
    count, before, after, _, _ = rewrite(RULE, build(), given)
    assert count == 1
    assert_close(before, after)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pairs": 4}, "not 4 pairs of 16 channels"),
        ({"other": True}, "turned by different tables"),
        ({"mask": True}, "depend on more than the positions"),
        ({"read": True}, "something else reads"),
    ],
)
def test_what_the_operator_cannot_say_is_left_with_a_reason(options, reason, given):
    count, before, after, _, notes = rewrite(RULE, build(**options), given)
    assert count == 0
    assert reason in notes[0].reason
    assert_close(before, after)


@pytest.mark.parametrize("options", [{}, {"rotary_interleaved": True, "window": 9}])
def test_a_model_is_proven_with_it(options, export):
    model = random_gpt(**LLAMA, **options)
    path, build = export(model, ORT_CPU, told=True)
    kinds = [node.op_type for node in ir.load(path).graph]
    assert not {"RotaryEmbedding", "Split", "Cos", "Sin", "Range"} & set(kinds)
    assert build.notes.entries == []
    file = ORT_CPU.facts("onnx/model.onnx")
    proof = prove(path, model, file=file)
    assert proof.passed, proof.failure
    assert locate(path, model, file=file) is None


def test_a_table_off_by_one_is_caught_and_located(export, tmp_path):
    model = random_gpt(**LLAMA)
    graph = ir.load(export(model, ORT_CPU))
    table = graph.graph.initializers["rotary.cosines"]
    table.const_value = ir.tensor(np.roll(table.const_value.numpy(), 1, axis=0))
    ir.save(graph, tmp_path / "model.onnx")
    file = ORT_CPU.facts("onnx/model.onnx")
    assert not prove(tmp_path / "model.onnx", model, cases=["decode"], file=file).passed
    assert locate(tmp_path / "model.onnx", model, file=file).op_type == "GroupQueryAttention"


def test_padding_in_the_cache_keeps_the_rotation_outside():
    model = random_gpt(**LLAMA, n_layer=1)
    graph = build_graph(model, model.config, build_of(model, PORTABLE))
    assert [node.op_type for node in graph.graph].count("RotaryEmbedding") == 2
