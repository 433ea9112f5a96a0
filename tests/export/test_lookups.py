"""Look-ups in quantised tables by standard operators: the same rows, the same bytes, a proof."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from random_models import build_of, random_gpt

from gptopt.export.bisect import explain
from gptopt.export.lookups import lookups, unfold_lookups
from gptopt.export.notes import Notes
from gptopt.export.pipeline import build_graph
from gptopt.export.quantize import quantize_graph
from gptopt.export.registry import check_kernels
from gptopt.export.targets import TARGETS
from gptopt.export.twin import held_by
from gptopt.export.validate import prove
from gptopt.export.write import save
from gptopt.kernels.quantization import dequantize, quantize
from gptopt.precisions import PRECISIONS

WEB = TARGETS["web"]
IDS = np.array([[3, 0, 10], [10, 7, 3]])


def table_graph(blocks, floats):
    """One GatherBlockQuantized, as the quantise stage writes it."""
    ids = ir.Value(name="ids", shape=ir.Shape(["B", "T"]), type=ir.TensorType(ir.DataType.INT64))
    tensors = {"rows": blocks.packed.flatten(1), "scales": blocks.scales.to(floats)}
    if blocks.zero_points is not None:
        tensors["zeros"] = blocks.zero_points
    values = {
        name: ir.Value(
            name=f"wte.{name}", const_value=(held := ir.tensor(tensor.numpy(), name=f"wte.{name}")),
            shape=ir.Shape(held.shape), type=ir.TensorType(held.dtype),
        )
        for name, tensor in tensors.items()
    }  # fmt: skip
    rows, scales, *zeros = values.values()
    node = ir.node(
        "GatherBlockQuantized", [rows, ids, scales, *zeros], domain="com.microsoft",
        attributes={"bits": blocks.bits, "block_size": blocks.block, "quantize_axis": 1,
                    "gather_axis": 0},
    )  # fmt: skip
    out = node.outputs[0]
    out.name, out.type = "taken", ir.TensorType(scales.dtype)
    out.shape = ir.Shape(["B", "T", blocks.columns])
    graph = ir.Graph(
        [ids], [out], nodes=[node], initializers=list(values.values()), name="lookup",
        opset_imports={"": 21, "com.microsoft": 1},
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def run(graph):
    content = ir.to_proto(graph).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": IDS})[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("width", "block"), [(64, 64), (96, 32), (48, 16)])
def test_rows_are_those_of_the_fused_operator_to_the_bit(bits, symmetric, width, block):
    torch.manual_seed(bits)
    blocks = quantize(torch.randn(11, width), bits=bits, block=block, symmetric=symmetric)
    graph = table_graph(blocks, torch.float32)
    fused = run(graph)
    unfold_lookups(graph)
    assert "GatherBlockQuantized" not in {node.op_type for node in graph.graph}
    np.testing.assert_array_equal(run(graph), fused)
    np.testing.assert_array_equal(fused, dequantize(blocks).numpy()[IDS])
    assert [each[1:] for each in lookups(graph)] == [("wte", bits, block)]


def test_halves_stay_halves():
    torch.manual_seed(0)
    blocks = quantize(torch.randn(11, 96), bits=4, block=32)
    graph = table_graph(blocks, torch.float16)
    unfold_lookups(graph)
    found = run(graph)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, dequantize(blocks).numpy()[IDS], rtol=2e-3)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def web(request):
    torch.manual_seed(0)
    model = random_gpt(tie_head=request.param, n_layer=1, block_size=72, vocab_size=512)
    return model, build_graph(model, model.config, build_of(model, WEB))


def written(graph, path, name):
    """A precision as the web target writes it."""
    found = quantize_graph(graph, PRECISIONS[name], Notes())
    fused = held_of(found, path)
    unfold_lookups(found)
    check_kernels(found, WEB, Notes())
    return found, fused, save(found, path, external=True)


def held_of(graph, path):
    save(graph, path, external=False)
    return held_by(path)


@pytest.mark.parametrize("name", ["q4", "q8", "q4f16"])
def test_the_web_target_says_what_the_model_says_without_the_fused_operator(web, name, tmp_path):
    model, graph = web
    path = tmp_path / "model.onnx"
    found, fused, size = written(graph, path, name)
    kinds = Counter(node.op_type for node in ir.load(path).graph)
    assert kinds["GatherBlockQuantized"] == 0
    held = held_by(path)
    assert held.bits == fused.bits
    assert held.tables.keys() == fused.tables.keys() == {"wte.weight"}
    torch.testing.assert_close(held.tables["wte.weight"], fused.tables["wte.weight"])
    file = WEB.facts("onnx/model.onnx", PRECISIONS[name].floats)
    proof = prove(path, model, vocab_size=None, file=file)
    assert proof.passed, proof.failure
    if model.config.tie_head:
        codes = found.graph.initializers["wte.weight.codes"].const_value
        assert size.shared_bytes >= codes.nbytes > 0


def test_codes_in_the_wrong_order_are_found_where_they_lie(web, tmp_path):
    model, graph = web
    path = tmp_path / "model.onnx"
    found, _, _ = written(graph, path, "q4")
    (made,) = lookups(found)
    joined = made.node
    while joined.op_type != "Concat":  # of the codes in a byte, lowest bits first
        joined = joined.inputs[0].producer()
    low, high = joined.inputs
    joined.replace_input_with(0, high)
    joined.replace_input_with(1, low)
    save(found, path, external=True)
    file = WEB.facts("onnx/model.onnx")
    assert not prove(path, model, vocab_size=None, file=file).passed
    assert "wte" in explain(path, model, file)
