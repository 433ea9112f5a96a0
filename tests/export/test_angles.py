"""Cosines and sines of positions from tables: the same graph, and no GPU's approximations."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from random_models import build_of, random_gpt

from gptopt.export.angles import tabulate_angles
from gptopt.export.pipeline import build_graph
from gptopt.export.targets import PORTABLE, WEB
from gptopt.export.validate import prove

SIZES = {"n_layer": 1, "block_size": 72, "vocab_size": 512}
ROTARY = {"position": "rotary", "n_kv_head": 2}


@pytest.mark.parametrize(
    "options", [ROTARY, {**ROTARY, "rotary_interleaved": True}, {"position": "sinusoidal"}]
)
def test_the_web_target_computes_no_angle_and_says_what_the_model_says(options, tmp_path):
    model = random_gpt(**SIZES, **options)
    path = tmp_path / "model.onnx"
    ir.save(build_graph(model, model.config, build_of(model, WEB)), path)
    kinds = Counter(node.op_type for node in ir.load(path).graph)
    assert kinds["Cos"] == kinds["Sin"] == 0
    proof = prove(path, model, file=WEB.facts("onnx/model.onnx"))
    assert proof.passed, proof.failure


def test_a_table_holds_a_row_for_each_position():
    model = random_gpt(**SIZES, **ROTARY)
    graph = build_graph(model, model.config, build_of(model, PORTABLE))
    before = {node.op_type for node in graph.graph}
    assert {"Cos", "Sin"} <= before
    tabulate_angles(graph, 72)
    tables = {
        name: value.const_value.numpy()
        for name, value in graph.graph.initializers.items()
        if name.endswith(".table")
    }
    cos, sin = tables.values()
    assert cos.shape == sin.shape == (72, 4)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    np.testing.assert_allclose(np.arctan2(sin, cos)[:3, 0], [0, 1, 2], atol=1e-6)


def test_other_cosines_stay():
    model = random_gpt(**SIZES, **ROTARY)
    graph = build_graph(model, model.config, build_of(model, PORTABLE))
    ids = next(
        node for node in graph.graph if "position_ids" in [v and v.name for v in node.inputs]
    )
    ids.replace_input_with(0, graph.graph.inputs[0])
    tabulate_angles(graph, 72)
    assert {"Cos", "Sin"} <= {node.op_type for node in graph.graph}
