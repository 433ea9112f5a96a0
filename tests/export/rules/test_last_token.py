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


def test_scores_that_are_mixed_along_the_text_are_left_alone(given):
    count, *_, notes = rewrite(RULE, build("Softmax"), given)
    assert count == 0
    assert notes[0].reason == "Softmax stands between the head and the logits"
