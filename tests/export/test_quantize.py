"""The quantise stage: graphs that say what the model with rounded weights says, shared bytes."""

import copy

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from random_models import build_of, random_gpt

from gptopt.errors import UserError
from gptopt.export.cache import quantize_cache
from gptopt.export.calibration import Calibration
from gptopt.export.notes import Notes
from gptopt.export.pipeline import build_graph
from gptopt.export.quantize import matrix, products, quantize_graph
from gptopt.export.targets import GROWING, ORT_CPU, PORTABLE
from gptopt.export.write import save
from gptopt.kernels.quantization import (
    Blocks,
    dequantize,
    dequantize_channels,
    quantize,
    quantize_channels,
)
from gptopt.precisions import (
    PRECISIONS,
    BlockFormat,
    ChannelFormat,
    Precision,
    find_precisions,
)
from gptopt.runtime.graph import check_graph

LLAMA = {
    "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2,
    "attn_softcap": 20.0, "logit_softcap": 30.0, "bias": False,
}  # fmt: skip
MASK = np.ones((2, 24), dtype=np.int64)
MASK[1, :6] = 0


@pytest.fixture(scope="module")
def tied():
    model = random_gpt(tie_head=True)
    return model, build_graph(model, model.config, build_of(model, PORTABLE))


@pytest.fixture(scope="module")
def llama():
    model = random_gpt(**LLAMA)
    return model, build_graph(model, model.config, build_of(model, PORTABLE))


@pytest.fixture(scope="module")
def standard(llama):
    model, _ = llama
    return build_graph(model, model.config, build_of(model, GROWING))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(3).integers(0, 2048, MASK.shape)


def open_session(graph, folder, *, external=False):
    path = folder / "model.onnx"
    save(graph, path, external=external)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def numpy_type(value):
    return {"float": "float32", "float16": "float16", "int8": "int8"}[value.type[7:-1]]


def feeds(session, ids, mask, past=None):
    given = {"input_ids": ids, "attention_mask": mask}
    given["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    for index, value in enumerate(session.get_inputs()[3:]):
        shape = (len(ids), value.shape[1], 0, value.shape[3])
        empty = np.zeros(shape, dtype=numpy_type(value))
        given[value.name] = empty if past is None else past[index]
    return given


def logits(graph, ids, folder, *, external=False):
    """Logits of the tokens that are not padding, (n, V)."""
    session = open_session(graph, folder, external=external)
    found = session.run(None, feeds(session, ids, MASK))[0]
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    return found[MASK > 0]


def exactly(graph):
    """The graph without int8 inputs of its products, so that only weights are rounded."""
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", 0))
    return graph


def distance(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@torch.no_grad()
def said_in_torch(model, ids, rounded):
    """Logits of a model whose weights went through `rounded(name, weight)`."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        weight.copy_(rounded(name, weight))
    mask = torch.from_numpy(MASK)
    return model(torch.from_numpy(ids), attention_mask=mask).logits.numpy()[MASK > 0]


def blocks_of(form):
    def rounded(name, weight):
        if weight.dim() == 1 or "wpe" in name:
            return weight
        return dequantize(
            quantize(weight, bits=form.bits, block=form.block, symmetric=form.symmetric,
                     method=form.method)
        )  # fmt: skip

    return rounded


@pytest.mark.parametrize("name", ["tied", "llama"])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False), (2, False)])
def test_a_graph_says_what_the_model_with_rounded_weights_says(
    name, bits, symmetric, ids, tmp_path, request
):
    model, graph = request.getfixturevalue(name)
    form = BlockFormat(bits=bits, block=32, symmetric=symmetric)
    precision = Precision(name="p", suffix="", layers=form, head=form)
    found = logits(exactly(quantize_graph(graph, precision, Notes())), ids, tmp_path)
    wanted = said_in_torch(model, ids, blocks_of(form))
    assert distance(found, wanted) < 2e-5
    assert distance(logits(graph, ids, tmp_path), wanted) > 1e-3  # the rounding shows


def test_dynamic_int8_says_what_the_model_with_rounded_weights_says(llama, ids, tmp_path):
    model, graph = llama
    precision = Precision(name="p", suffix="", layers=ChannelFormat())

    def rounded(name, weight):
        if weight.dim() == 1 or name in ("wte.weight", "head.weight"):
            return weight
        return dequantize_channels(quantize_channels(weight))

    found = logits(quantize_graph(graph, precision, Notes()), ids, tmp_path)
    wanted = said_in_torch(model, ids, rounded)
    assert (found - wanted).std() < 0.1 * wanted.std()  # inputs are int8 as well


@pytest.mark.parametrize("name", ["tied", "llama"])
@pytest.mark.parametrize(("precision", "bound"), [
    ("fp32", 0.0), ("fp16", 0.01), ("q8", 0.06), ("q4", 0.6), ("q4f16", 0.6), ("q2", 1.2),
])  # fmt: skip
def test_each_precision_runs_within_its_error(name, precision, bound, ids, tmp_path, request):
    _, graph = request.getfixturevalue(name)
    wanted = logits(graph, ids, tmp_path)
    found = logits(quantize_graph(graph, PRECISIONS[precision], Notes()), ids, tmp_path)
    error = (found - wanted).std() / wanted.std()
    assert bound / 100 <= error <= bound


def test_int8_products_are_asked_for_and_biases_go_in(tied):
    _, graph = tied
    found = quantize_graph(graph, PRECISIONS["q4"], Notes()).graph
    products = [node for node in found if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 4 + 1
    assert all(node.attributes["accuracy_level"].as_int() == 4 for node in products)
    with_bias = [node for node in products if len(node.inputs) == 6]
    assert {node.inputs[5].name for node in with_bias} >= {"blocks.0.attn.qkv.bias"}
    added = {value for node in found if node.op_type == "Add" for value in node.inputs}
    assert not added & {node.inputs[5] for node in with_bias}
    assert not [node for node in found if node.op_type in ("MatMul", "Transpose")]


def test_a_tied_head_and_its_embedding_are_one_piece_of_the_file(tied, ids, tmp_path):
    _, graph = tied
    found = quantize_graph(graph, PRECISIONS["q4"], Notes())
    assert "wte.weight" not in found.graph.initializers
    written = save(found, tmp_path / "size.onnx", external=True)
    assert written.shared_bytes == 2048 * 32 // 2
    apart, shared = (logits(found, ids, tmp_path, external=outside) for outside in (False, True))
    np.testing.assert_array_equal(apart, shared)
    check_graph(tmp_path / "model.onnx")


def test_a_width_that_no_block_divides_is_stored_twice_and_noted(ids, tmp_path):
    model = random_gpt(tie_head=True, n_embd=40, n_head=5)
    notes = Notes()
    graph = build_graph(model, model.config, build_of(model, PORTABLE))
    found = quantize_graph(graph, PRECISIONS["q8"], notes)
    assert {"wte.weight", "wte.weight.codes"} <= set(found.graph.initializers)
    assert any("twice" in note.what and note.where == "wte.weight" for note in notes.entries)
    assert np.isfinite(logits(found, ids, tmp_path)).all()


@pytest.mark.parametrize(("width", "largest", "block"), [
    (768, 256, 256), (768, 128, 128), (96, 128, 32), (40, 128, None), (1600, 128, 64),
])  # fmt: skip
def test_the_largest_block_that_divides_is_taken(width, largest, block):
    fitted = BlockFormat(bits=4, block=largest).fitted(width, looked_up=True)
    assert (fitted and fitted.block) == block


def test_one_layer_can_be_told_apart(llama):
    _, graph = llama
    precision = Precision(
        name="p", suffix="", layers=PRECISIONS["q4"].layers,
        overrides={
            "blocks.0.ffn.down.weight": None,
            "blocks.1.ffn.down.weight": BlockFormat(bits=8, block=64),
        },
    )  # fmt: skip
    found = quantize_graph(graph, precision, Notes()).graph
    assert "blocks.0.ffn.down.weight" in found.initializers
    assert "head.weight" in found.initializers
    eight = [n for n in found if n.op_type == "MatMulNBits" and n.attributes["bits"].as_int() == 8]
    assert [node.inputs[1].name for node in eight] == ["blocks.1.ffn.down.weight.codes"]


@pytest.mark.parametrize("name", ["q4", "q4f16", "q2"])
def test_the_first_queries_keys_and_values_keep_eight_bits(llama, name):
    _, graph = llama
    products = [n for n in quantize_graph(graph, PRECISIONS[name], Notes()).graph
                if n.op_type == "MatMulNBits"]  # fmt: skip
    eight = [n.inputs[1].name for n in products if n.attributes["bits"].as_int() == 8]
    assert eight == ["blocks.0.attn.qkv.weight.codes"]


@pytest.mark.parametrize("name", ["q4", "q8", "fp16", "q4f16"])
def test_the_graph_that_came_in_stays_as_it_was(llama, name, ids, tmp_path):
    _, graph = llama
    before = logits(graph, ids, tmp_path)
    types = [(value.name, value.type) for node in graph.graph for value in node.outputs]
    quantize_graph(graph, PRECISIONS[name], Notes())
    assert types == [(value.name, value.type) for node in graph.graph for value in node.outputs]
    np.testing.assert_array_equal(logits(graph, ids, tmp_path), before)


def products_error(graph, model, calibration):
    """Weight -> relative error of its products with the calibration's inputs."""
    found = {}
    for node in graph.graph:
        if node.op_type != "MatMulNBits":
            continue
        codes, scales = (torch.from_numpy(value.const_value.numpy()) for value in node.inputs[1:3])
        name = node.inputs[1].name.removesuffix(".codes")
        size = {key: node.attributes[key].as_int() for key in ("bits", "block_size", "K")}
        blocks = Blocks(
            packed=codes, scales=scales, zero_points=None, bits=size["bits"],
            block=size["block_size"], columns=size["K"],
        )  # fmt: skip
        weight, hessian = model.get_parameter(name).detach(), calibration.hessian(name)
        rest = dequantize(blocks) - weight
        found[name] = ((rest @ hessian) * rest).sum() / ((weight @ hessian) * weight).sum()
    return found


def test_a_calibration_text_makes_every_product_better(llama):
    model, graph = llama
    text = np.random.default_rng(5).integers(0, 2048, 4096).tolist()
    calibration, errors = Calibration(model, text), []
    for given in (None, calibration):
        notes = Notes()
        found = quantize_graph(graph, PRECISIONS["q4"], notes, calibration=given)
        errors.append(products_error(found, model, calibration))
        assert any("gptq" in note.what for note in notes.entries) == (given is None)
    without, with_text = errors
    assert len(without) == 2 * 5 + 1
    # The first layer reads noise here, and white inputs leave nothing to make up for; the head's
    # narrow blocks leave little.
    assert with_text.pop("head.weight") < 1.01 * without.pop("head.weight")
    assert all(with_text[name] < error for name, error in without.items())
    assert sum(with_text.values()) < 0.85 * sum(without.values())


def test_positions_are_computed_in_float32_and_logits_leave_in_it(standard):
    half = quantize_graph(standard, PRECISIONS["fp16"], Notes()).graph
    waves = [node for node in half if node.op_type in ("Cos", "Sin")]
    assert waves
    assert {value.dtype for node in waves for value in node.inputs} == {ir.DataType.FLOAT}
    kinds = {value.name: value.dtype for value in (*half.inputs, *half.outputs)}
    assert kinds["logits"] == ir.DataType.FLOAT
    assert kinds["past_key_values.0.key"] == kinds["present.1.value"] == ir.DataType.FLOAT16


@pytest.mark.parametrize("target", [PORTABLE, GROWING], ids=["portable", "growing"])
def test_a_row_of_padding_only_stays_finite_in_float16(target, ids, tmp_path):
    model = random_gpt(position="alibi")
    graph = build_graph(model, model.config, build_of(model, target))
    half = quantize_graph(graph, PRECISIONS["fp16"], Notes())
    wanted = logits(graph, ids, tmp_path)
    assert distance(logits(half, ids, tmp_path), wanted) < 0.02


def test_a_weight_beyond_float16_is_clipped_and_noted(standard, tmp_path):
    graph = standard.clone()
    weight = graph.graph.initializers["norm.weight"]
    weight.const_value = ir.Tensor(np.full(32, 1e6, dtype=np.float32))
    notes = Notes()
    save(quantize_graph(graph, PRECISIONS["fp16"], notes), tmp_path / "m.onnx", external=False)
    assert [note.where for note in notes.entries if "clipped" in note.what] == ["norm.weight"]


@pytest.fixture(scope="module")
def fast(llama):
    model, _ = llama
    text = np.random.default_rng(5).integers(0, 2048, 2048).tolist()
    return build_graph(model, model.config, build_of(model, ORT_CPU)), Calibration(model, text)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_an_int8_cache_decodes_what_a_float_one_decodes(per, fast, ids, tmp_path):
    graph, calibration = fast
    notes = Notes()
    small = quantize_cache(graph, calibration.cache_ranges(), notes, per=per)
    assert notes.entries
    told = [decode(each, ids[:1], tmp_path) for each in (graph, small)]
    error = (told[1] - told[0]).std() / told[0].std()
    assert 1e-5 < error < 0.03


def decode(graph, ids, folder):
    """Logits of a prompt of 8 tokens and of the tokens after it, one at a time."""
    session = open_session(graph, folder)
    said, past = [], None
    for start, end in [(0, 8), *((t, t + 1) for t in range(8, ids.shape[1]))]:
        mask = np.ones((1, end), dtype=np.int64)
        out, *past = session.run(None, feeds(session, ids[:, start:end], mask, past))
        said.append(out)
    return np.concatenate(said, axis=1)


def test_an_int8_cache_needs_an_operator_that_reads_it(standard):
    ranges = [(torch.ones(4, 8), torch.ones(4, 8))] * 2
    with pytest.raises(UserError, match="--cache int8: layer 0 has no GroupQueryAttention"):
        quantize_cache(standard, ranges, Notes())


def test_a_tied_head_is_calibrated_too(tied):
    model, graph = tied
    text = np.random.default_rng(5).integers(0, 2048, 2048).tolist()
    calibration = Calibration(model, text)
    errors = [
        products_error(
            quantize_graph(graph, PRECISIONS["q4"], Notes(), calibration=given), model, calibration
        )["wte.weight"]
        for given in (None, calibration)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_weights_of_a_mapped_file_are_copied(tied):
    _, graph = tied
    copied = graph.clone()
    for product in products(copied.graph):
        array = product.weight.const_value.numpy()
        array = np.ascontiguousarray(array if product.transposed else array.T)
        array.flags.writeable = False
        stored = array if product.transposed else array.T
        product.weight.const_value = ir.Tensor(stored, name=product.weight.name)
        found = matrix(product)  # PyTorch warns of arrays that may only be read
        assert np.array_equal(found.numpy(), array)
        found.add_(1)


def test_dynamic_int8_in_float16_is_refused():
    with pytest.raises(ValueError, match="float32 only"):
        Precision(name="q8f16", suffix="", layers=ChannelFormat(), floats="float16")


def test_precisions_are_found_by_name():
    assert [each.name for each in find_precisions("q4, fp32,q4")] == ["q4", "fp32"]
    for wrong in ("q5", "", "fp32,x"):
        with pytest.raises(UserError, match="--precision: found"):
            find_precisions(wrong)
