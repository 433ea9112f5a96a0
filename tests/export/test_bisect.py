"""The wrong operator of a wrong graph is named: by layer, by node, fused and quantised ones too."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from random_models import random_gpt, spread
from test_user_model import Model

from gptopt.bench import faults
from gptopt.bench.fault_kinds import KINDS
from gptopt.errors import CheckFailed
from gptopt.export import package
from gptopt.export.bisect import Bisection, locate
from gptopt.export.targets import LEGACY, PORTABLE
from gptopt.export.write import save

# A few kinds for each form; all of them are in the committed table.
SOME = {
    "gpt2-standard-growing-fp32": ("keys and values swapped", "epsilon", "position", "head untied"),
    "llama-portable-fp32": ("mask removed", "activation", "rotary pairs", "another layers weight"),
    "gpt2-portable-q4": ("block scale", "codes moved", "bias dropped", "tokens miscounted"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    found = faults.cases(tmp_path_factory.mktemp("cases"), SOME)
    return {case.name: case for case in found}


def some(case):
    """The first and the last fault of each kind."""
    found = {}
    for fault, graph in faults.faults(case, SOME[case.name]):
        found.setdefault(fault.kind, []).append((fault, graph))
    for kind in SOME[case.name]:
        yield from {id(each): each for each in (found[kind][0], found[kind][-1])}.values()


@pytest.mark.parametrize("name", SOME)
def test_a_right_graph_departs_nowhere_and_a_wrong_one_where_it_was_changed(cases, name, tmp_path):
    case = cases[name]
    assert case.bisection.locate(case.path, case.file) is None
    rows = [faults.judge(case, fault, graph, tmp_path) for fault, graph in some(case)]
    assert len(rows) >= 5
    wrong = [row for row in rows if not row["exact"] and row["kind"] != "activation"]
    assert not wrong
    assert all(row["between"] and row["nodes"] <= 4 for row in rows if row["kind"] == "activation")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faulty.onnx"]


def test_layer_operator_error_and_budget_are_told_in_a_line(cases, tmp_path):
    case = cases["gpt2-standard-growing-fp32"]
    graph = ir.load(case.path)
    weight = graph.graph.initializers["blocks.1.ffn.up.weight"]
    (node,) = weight.consumers()
    array = weight.const_value.numpy() * np.float32(1.01)
    other = ir.Value(name="foreign", const_value=ir.tensor(array, name="foreign"))
    other.shape, other.type = weight.shape, weight.type
    graph.graph.initializers.add(other)
    node.replace_input_with(1, other)
    ir.save(graph, tmp_path / "model.onnx")
    found = case.bisection.locate(tmp_path / "model.onnx", case.file)
    assert (node.name in found.nodes, found.layer) == (True, 1)
    assert 0 <= found.budget < found.error
    assert "of layer 1) departs first: " in str(found)
    assert "\n" not in str(found)
    assert json.dumps(found.as_dict())


def test_primitives_are_located_by_the_results_around_them(export, tmp_path):
    model = random_gpt(position="rotary", norm="rmsnorm")
    path, build = export(model, LEGACY, told=True)
    graph = ir.load(path)
    softmaxes = [node for node in graph.graph if node.op_type == "Softmax"]
    softmaxes[1].op_type = "Relu"
    softmaxes[1].attributes.clear()
    ir.save(graph, tmp_path / "model.onnx")
    found = locate(tmp_path / "model.onnx", model, file=build.target.facts("onnx/model.onnx"))
    assert found.layer == 1
    assert softmaxes[1].name in found.nodes
    assert softmaxes[0].name not in found.nodes


def test_a_module_of_the_user_is_bisected_as_well(export, tmp_path):
    torch.manual_seed(0)
    model = spread(Model())
    path, build = export(model, PORTABLE, told=True)
    file = build.target.facts("onnx/model.onnx")
    bisection = Bisection(model)
    assert bisection.locate(path, file) is None
    graph = ir.load(path)
    weight = graph.graph.initializers["blocks.2.down.weight"]
    (node,) = weight.consumers()
    array = np.array(weight.const_value.numpy())
    array[3, 5] += 0.5
    weight.const_value = ir.tensor(array, name=weight.name)
    ir.save(graph, tmp_path / "model.onnx")
    found = bisection.locate(tmp_path / "model.onnx", file)
    assert (found.node, found.layer) == (node.name, 2)
    assert found.compared == "stored blocks.2.down.weight"


def test_every_kind_is_in_the_committed_table_and_almost_all_are_located():
    path = Path(__file__).parents[2] / "bench" / "results" / "bisect.json"
    table = json.loads(path.read_text())
    assert table["faults"] == len(table["rows"]) >= 200
    assert table["located"] == sum(row["exact"] for row in table["rows"])
    assert table["located"] >= 0.95 * table["faults"]
    assert set(table["kinds"]) == set(KINDS)


def test_an_export_that_fails_its_proof_names_the_operator(monkeypatch, tmp_path):
    model = random_gpt(block_size=16, vocab_size=64)

    def spoil(graph, path, **options):
        node = [each for each in graph.graph if each.op_type == "SkipLayerNormalization"][2]
        node.attributes.add(ir.AttrFloat32("epsilon", 0.1))
        save(graph, path, **options)

    monkeypatch.setattr(package, "save", spoil)
    with pytest.raises(CheckFailed, match=r"not written, .*budget") as caught:
        package.export_model(model, None, tmp_path / "edge")
    assert "(SkipLayerNormalization of layer 1) departs first: norm of" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["edge.failed-report.json"]
    report = json.loads((tmp_path / "edge.failed-report.json").read_text())
    assert report["departure"]["op_type"] == "SkipLayerNormalization"
