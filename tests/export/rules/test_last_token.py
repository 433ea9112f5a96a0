"""Scores of the last positions on request."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from rule_graphs import B, C, Graph, T, assert_close, rewrite

from gptopt.export.rules.last_token import RULE

V = 5


def build(between=None):
    g = Graph()
    x = g.input("x", ["B", "T", C])
    head = g.weight(np.random.default_rng(3).standard_normal((C, V)).astype(np.float32))
    scores = g.node("MatMul", x, head, shape=("B", "T", V))
    if between == "Tanh":
        scores = g.node("Tanh", scores, shape=("B", "T", V))
    if between == "Softmax":
        scores = g.node("Softmax", scores, axis=1, shape=("B", "T", V))
    return g.model(scores)


@pytest.fixture
def given():
    random = np.random.default_rng(4)
    return {"x": random.standard_normal((B, T, C)).astype(np.float32)}


@pytest.mark.parametrize("between", [None, "Tanh"])
def test_all_are_scored_unless_fewer_are_asked_for(between, given):
    model = build(between)
    count, before, after, _, _ = rewrite(RULE, model, given)
    assert count == 1
    assert_close(before, after)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    assert [each.name for each in session.get_inputs()] == ["x"]
    for n in range(1, T + 1):
        (last,) = session.run(None, {**given, "num_logits_to_keep": np.array([n])})
        assert_close([before[0][:, -n:]], [last])


def block(mixed=False):
    """What stands behind the last attention: a projection, a norm, a feed-forward layer, a head."""
    g, random = Graph(), np.random.default_rng(5)
    attended, residual = g.input("x", ["B", "T", C]), g.input("r", ["B", "T", C])

    def matrix(columns):
        return g.weight(random.standard_normal((C, columns)).astype(np.float32))

    bias, gain = (g.weight(random.standard_normal(C).astype(np.float32)) for _ in range(2))
    stream = g.node("Add", g.node("Add", g.node("MatMul", attended, matrix(C)), bias), residual)
    inner = g.node("LayerNormalization", stream, gain, bias, axis=-1)
    if mixed:
        inner = g.node("Softmax", inner, axis=1)
    inner = g.node("FastGelu", g.node("MatMul", inner, matrix(C)), domain="com.microsoft")
    stream = g.node("Add", g.node("MatMul", inner, matrix(C)), stream)
    normed = g.node("LayerNormalization", stream, gain, bias, axis=-1)
    return g.model(g.node("MatMul", normed, matrix(V), shape=("B", "T", V)))


@pytest.fixture
def two(given):
    random = np.random.default_rng(6)
    return {**given, "r": random.standard_normal((B, T, C)).astype(np.float32)}


def slices(model):
    found = [node for node in model.graph if node.op_type == "Slice"]
    return [node.inputs[0].name for node in found]


def test_what_is_not_scored_is_dropped_behind_the_last_attention(two):
    model = block()
    count, before, after, *_ = rewrite(RULE, model, two)
    assert count == 1
    assert_close(before, after)
    assert sorted(slices(model)) == ["r", "x"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for n in range(1, T + 1):
        (last,) = session.run(None, {**two, "num_logits_to_keep": np.array([n])})
        assert_close([before[0][:, -n:]], [last])


def test_a_negative_number_keeps_no_position(two):
    model = block()
    rewrite(RULE, model, two)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (none,) = session.run(None, {**two, "num_logits_to_keep": np.array([-(2**31)])})
    assert none.shape == (B, 0, V)


def test_what_mixes_positions_sees_all_of_them(two):
    model = block(mixed=True)
    count, before, after, *_ = rewrite(RULE, model, two)
    assert count == 1
    assert_close(before, after)
    mixing = next(node for node in model.graph if node.op_type == "Softmax")
    assert mixing.outputs[0].name in slices(model)
    assert "x" not in slices(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (last,) = session.run(None, {**two, "num_logits_to_keep": np.array([1])})
    assert_close([before[0][:, -1:]], [last])


def test_scores_that_are_mixed_along_the_text_are_left_alone(given):
    count, *_, notes = rewrite(RULE, build("Softmax"), given)
    assert count == 0
    assert notes[0].reason == "Softmax stands between the head and the logits"
