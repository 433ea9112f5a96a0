"""SkipLayerNormalization in the place of Add and a norm."""

import numpy as np
import pytest
from rule_graphs import B, C, Graph, T, assert_close, rewrite

from gptopt.export.rules.skip_layernorm import RULE

KINDS = {
    "LayerNormalization": "SkipLayerNormalization",
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
}


@pytest.fixture
def random():
    return np.random.default_rng(0)


def feeds(random):
    return {name: random.standard_normal((B, T, C)).astype(np.float32) for name in "xy"}


def vector(g, random):
    return g.weight(random.standard_normal(C).astype(np.float32))


def build(random, kind, *, beta, bias, swapped=False, axis=-1, shape=("B", "T", C)):
    g = Graph()
    x, y = g.input("x", ["B", "T", C]), g.input("y", shape)
    written = g.node("Add", x, vector(g, random)) if bias else x
    total = g.node("Add", y, written) if swapped else g.node("Add", written, y)
    weights = [vector(g, random)] + [vector(g, random)] * beta
    normed = g.node(kind, total, *weights, axis=axis, epsilon=1e-3)
    return g, normed, total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_sum_and_norm_are_one_node(kind, bias, swapped, random):
    beta = kind == "LayerNormalization"
    g, normed, total = build(random, kind, beta=beta, bias=bias, swapped=swapped)
    model = g.model(normed, total)
    count, before, after, kinds, _ = rewrite(RULE, model, feeds(random))
    assert count == 1
    assert kinds == [KINDS[kind]]
    assert_close(before, after)
    assert [value.name for value in model.graph.outputs] == ["v1_0", "v0_0"] or bias


def test_a_norm_without_a_second_weight_keeps_its_bias_apart(random):
    g, normed, _ = build(random, "LayerNormalization", beta=False, bias=True)
    count, before, after, kinds, _ = rewrite(RULE, g.model(normed), feeds(random))
    assert (count, kinds) == (1, ["SkipLayerNormalization"])
    assert_close(before, after)


def test_the_epsilon_goes_along(random):
    g, normed, _ = build(random, "LayerNormalization", beta=True, bias=False)
    model = g.model(normed)
    rewrite(RULE, model, feeds(random))
    assert model.graph.node(0).attributes["epsilon"].as_float() == pytest.approx(1e-3)


def test_a_bias_alone_is_no_sum_of_two_streams(random):
    g = Graph()
    x = g.input("x", ["B", "T", C])
    total = g.node("Add", x, vector(g, random))
    normed = g.node("LayerNormalization", total, vector(g, random), axis=-1)
    given = {"x": feeds(random)["x"]}
    count, *_, notes = rewrite(RULE, g.model(normed), given)
    assert (count, notes) == (0, [])


def test_what_is_broadcast_is_left_alone_with_a_reason(random):
    g, normed, _ = build(random, "LayerNormalization", beta=True, bias=False, shape=(1, "T", C))
    given = feeds(random)
    given["y"] = given["y"][:1]
    count, *_, notes = rewrite(RULE, g.model(normed), given)
    assert count == 0
    assert "not two tensors (B, T, C) of one shape" in notes[0].reason
