"""FastGelu and BiasGelu, which are never mixed."""

import numpy as np
import pytest
from rule_graphs import B, C, Graph, T, assert_close, rewrite

from gptopt.export.rules.bias_gelu import RULE


@pytest.fixture
def given():
    random = np.random.default_rng(1)
    return {"x": 2 * random.standard_normal((B, T, C)).astype(np.float32)}


def build(approximate, *, bias, read_twice=False):
    g = Graph()
    x = g.input("x", ["B", "T", C])
    if bias:
        x = g.node("Add", x, g.weight(np.linspace(-1, 1, C, dtype=np.float32)))
    active = g.node("Gelu", x, approximate=approximate)
    return g.model(active, x) if read_twice else g.model(active)


@pytest.mark.parametrize(
    ("approximate", "bias", "kinds"),
    [
        ("tanh", True, ["FastGelu"]),
        ("tanh", False, ["FastGelu"]),
        ("none", True, ["BiasGelu"]),
        ("none", False, ["Gelu"]),
    ],
)
def test_each_gelu_becomes_its_own_operator(approximate, bias, kinds, given):
    count, before, after, found, _ = rewrite(RULE, build(approximate, bias=bias), given)
    assert found == kinds
    assert count == (kinds != ["Gelu"])
    assert_close(before, after)


def test_the_two_gelus_differ_by_more_than_the_tolerance(given):
    _, before, _, _, _ = rewrite(RULE, build("tanh", bias=True), given)
    _, _, after, _, _ = rewrite(RULE, build("none", bias=True), given)
    with pytest.raises(AssertionError):
        assert_close(before, after)


def test_a_sum_that_others_read_stays(given):
    model = build("none", bias=True, read_twice=True)
    count, before, after, found, _ = rewrite(RULE, model, given)
    assert (count, found) == (0, ["Add", "Gelu"])
    assert_close(before, after)
