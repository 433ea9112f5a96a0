"""Fused and quantised graphs that are wrong on purpose: the proof has to catch every one."""

import contextlib

import numpy as np
import onnx_ir as ir
import pytest
import torch
from random_models import random_gpt
from test_mutants import (
    constant,
    insert,
    lost_residual,
    nodes,
    scale_weight,
    set_float,
    weight,
    zero,
)

from gptopt.errors import CheckFailed
from gptopt.export import prove
from gptopt.export.cache import quantize_cache
from gptopt.export.calibration import Calibration
from gptopt.export.notes import Notes
from gptopt.export.quantize import quantize_graph
from gptopt.export.targets import ORT_CPU, PORTABLE
from gptopt.export.write import save
from gptopt.precisions import PRECISIONS

FEW = ("prefill", "decode", "left padding", "right padding")
FACTS = {"portable": PORTABLE.facts("onnx/model.onnx"), "ort-cpu": ORT_CPU.facts("onnx/model.onnx")}


def attention(model, index=0):
    return nodes(model, "GroupQueryAttention")[index]


def swap_inputs(first, second):
    def mutate(model):
        node = attention(model, 1)
        a, b = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, b)
        node.replace_input_with(second, a)

    return mutate


def swap_packed_k_and_v(model):
    for ending, axis in (("blocks.0.attn.qkv.weight", 1), ("blocks.0.attn.qkv.bias", 0)):
        value = weight(model, ending)
        q, k, v = np.split(value.const_value.numpy(), 3, axis=axis)
        value.const_value = ir.tensor(np.concatenate((q, v, k), axis=axis))


def position_off_by_one(model):
    node = next(node for node in nodes(model, "Gather") if node.inputs[1].name == "position_ids")
    shifted = insert(model, node, "Sub", [node.inputs[1], constant(model, node, np.int64(1))])
    zeros = constant(model, node, np.int64(0))
    node.replace_input_with(1, insert(model, node, "Max", [shifted, zeros]))


def erf_gelu(model):
    nodes(model, "FastGelu")[0].op_type = "BiasGelu"


def no_padding_bias(model):
    for index in (0, 1):
        attention(model, index).replace_input_with(10, None)


def another_scale(model):
    node = attention(model)
    set_float(node, "scale", node.attributes["scale"].as_float() * 1.01)


def default_scale_of_another_width(model):
    set_float(attention(model), "scale", 32**-0.5)


def untied_head(model):
    node = nodes(model, "Transpose")[0]
    values = weight(model, "wte.weight").const_value.numpy().copy()
    values[7] *= 1.01
    node.replace_input_with(0, constant(model, node, values))


def another_epsilon(model):
    norms = [node for node in model.graph if node.op_type.endswith("LayerNormalization")]
    set_float(norms[1], "epsilon", 1e-3)


def no_causal_mask(model):
    attention(model).attributes.add(ir.AttrInt64("causal", 0))


def lost_bias(kind, index):
    def mutate(model):
        node = nodes(model, kind)[1]
        assert node.inputs[index] is not None
        node.resize_inputs(index)

    return mutate


def lost_stream(model):
    """The sum that the next layer reads is the norm's output instead."""
    node = nodes(model, "SkipLayerNormalization")[1]
    ir.convenience.replace_all_uses_with(node.outputs[3], node.outputs[0])


def tokens_counted_wrong(by):
    def mutate(model):
        last = attention(model).inputs[5]
        node = attention(model)
        moved = insert(model, node, "Add", [last, constant(model, node, np.int32(by))])
        for index in (0, 1):
            attention(model, index).replace_input_with(5, moved)

    return mutate


def padding_counted(model):
    """The right-padded form told that padding is text."""
    node = nodes(model, "ReduceSum")[0]
    zeros = insert(model, node, "Sub", [node.inputs[0], node.inputs[0]])
    node.replace_input_with(
        0, insert(model, node, "Add", [zeros, constant(model, node, np.int64(1))])
    )


def first_scores_kept(model):
    """num_logits_to_keep read as if it counted from the beginning."""
    node = nodes(model, "Neg")[0]
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


BOTH = {
    "past k and v swapped": swap_inputs(3, 4),
    "position off by one": position_off_by_one,
    "erf gelu": erf_gelu,
    "another scale": another_scale,
    "scale of another width": default_scale_of_another_width,
    "untied head": untied_head,
    "another epsilon": another_epsilon,
    "no causal mask": no_causal_mask,
    "bias of the ffn dropped": lost_bias("FastGelu", 1),
    "bias of a projection dropped": zero("blocks.1.attn.proj.bias"),
    "qkv bias dropped": zero("blocks.0.attn.qkv.bias"),
    "norm bias dropped": zero("norm.bias"),
    "one cached token too few": tokens_counted_wrong(-1),
    "a weight 0.1 % off": lambda model: scale_weight(model, "blocks.0.ffn.up.weight", 1.001),
}
ONLY = {
    "portable": {
        "k and v swapped": swap_inputs(1, 2),
        "no padding bias": no_padding_bias,
        "bias not in the norm": lost_bias("SkipLayerNormalization", 4),
        "lost stream": lost_stream,
    },
    "ort-cpu": {
        "k and v swapped": swap_packed_k_and_v,
        "padding counted": padding_counted,
        "lost stream": lost_residual,
    },
}
CASES = [
    (target, name, mutate) for target in FACTS for name, mutate in {**BOTH, **ONLY[target]}.items()
]


@pytest.fixture(scope="module")
def originals(export):
    """Target -> (model, path) of a GPT-2 with a tied head."""
    model = random_gpt(tie_head=True)
    return {target.name: (model, export(model, target)) for target in (PORTABLE, ORT_CPU)}


# onnxruntime's kernel may refuse these before it computes anything.
REFUSED = ("no causal mask", "one cached token too few")


def changed(original, mutate, folder):
    graph = ir.load(original)
    mutate(graph)
    ir.save(graph, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("target", "name", "mutate"), CASES, ids=[f"{target}-{name}" for target, name, _ in CASES]
)
def test_a_wrong_fused_graph_is_caught(target, name, mutate, originals, tmp_path):
    model, original = originals[target]
    path = changed(original, mutate, tmp_path)
    if name in REFUSED:
        with contextlib.suppress(CheckFailed):
            assert not prove(path, model, cases=FEW, file=FACTS[target]).passed
    else:
        assert not prove(path, model, cases=FEW, file=FACTS[target]).passed


def test_unchanged_graphs_pass(originals, tmp_path):
    for target, (model, original) in originals.items():
        path = changed(original, lambda graph: None, tmp_path)
        assert prove(path, model, cases=FEW, file=FACTS[target]).passed


def test_a_missing_padding_bias_shows_where_padding_is(originals, tmp_path):
    model, original = originals["portable"]
    proof = prove(changed(original, no_padding_bias, tmp_path), model, file=FACTS["portable"])
    failed = {each.case for each in proof.outcomes if not each.passed}
    assert failed == {"left padding", "right padding", "growing cache"}


def test_scores_of_the_wrong_positions_are_caught(originals, tmp_path):
    model, original = originals["portable"]
    path = changed(original, first_scores_kept, tmp_path)
    with pytest.raises(CheckFailed):
        proof = prove(path, model, cases=["last scores"], file=FACTS["portable"])
        raise CheckFailed(proof.failure or "")


def test_a_window_one_too_wide_is_caught(export, tmp_path):
    model = random_gpt(position="rotary", window=9, n_kv_head=2)
    original = export(model, ORT_CPU)

    def wider(graph):
        for node in nodes(graph, "GroupQueryAttention"):
            node.attributes.add(ir.AttrInt64("local_window_size", 10))

    assert prove(original, model, cases=FEW, file=FACTS["ort-cpu"]).passed
    path = changed(original, wider, tmp_path)
    assert not prove(path, model, cases=FEW, file=FACTS["ort-cpu"]).passed


@pytest.fixture(scope="module")
def lesser(originals, tmp_path_factory):
    """Files of less precision of the same model: name -> (path, facts)."""
    model, original = originals["portable"]
    folder, found = tmp_path_factory.mktemp("lesser"), {}
    graph = ir.load(original)
    for value in graph.graph.initializers.values():
        value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    for name in ("q4", "fp16", "q4f16"):
        save(quantize_graph(graph, PRECISIONS[name], Notes()), folder / name, external=False)
        found[name] = (folder / name, PORTABLE.facts("onnx/model.onnx", PRECISIONS[name].floats))
    ids = torch.randint(0, 2048, (1024,), generator=torch.Generator().manual_seed(5)).tolist()
    ranges = Calibration(model, ids).cache_ranges()
    save(quantize_cache(graph, ranges, Notes()), folder / "int8", external=False)
    found["int8 cache"] = (folder / "int8", PORTABLE.facts("onnx/model.onnx", "int8"))
    return found


def spoil_codes(graph):
    value = weight(graph, "blocks.0.ffn.up.weight.codes")
    value.const_value = ir.tensor(np.roll(value.const_value.numpy(), 1, axis=0))


WIRING = {
    "erf gelu": erf_gelu,
    "another epsilon": another_epsilon,
    "another scale": another_scale,
    "no padding bias": no_padding_bias,
    "k and v swapped": swap_inputs(1, 2),
    "past k and v swapped": swap_inputs(3, 4),
    "position off by one": position_off_by_one,
    "norm bias dropped": zero("norm.bias"),
}
FILES = ("q4", "fp16", "q4f16", "int8 cache")


@pytest.mark.parametrize("mutate", WIRING.values(), ids=WIRING)
@pytest.mark.parametrize("name", FILES)
def test_rounding_does_not_hide_a_wrong_graph(name, mutate, lesser, originals, tmp_path):
    path, file = lesser[name]
    path = changed(path, mutate, tmp_path)
    cases = ("decode", "left padding")
    assert not prove(path, originals["portable"][0], cases=cases, file=file).passed


@pytest.mark.parametrize("name", FILES)
def test_a_right_file_passes_strictly(name, lesser, originals):
    path, file = lesser[name]
    proof = prove(path, originals["portable"][0], cases=FEW, file=file)
    assert proof.passed, proof.failure
    label = "in float32" if file.cache_dtype == "float16" else "unrounded inputs"
    strict = [each for each in proof.outcomes if label in each.case]
    assert len(strict) == 4
    assert max(each.budget for each in strict) < 1e-3
    assert not list(path.parent.glob("*twin*"))


def test_weights_of_another_model_are_caught(lesser, originals, tmp_path):
    path, file = lesser["q4"]
    path = changed(path, spoil_codes, tmp_path)
    proof = prove(path, originals["portable"][0], cases=FEW, file=file)
    assert proof.failure.startswith("stored blocks.0.ffn.up.weight: differs by 1.")


def test_half_a_per_mille_of_a_half_is_caught(lesser, originals, tmp_path):
    path, file = lesser["fp16"]

    def spoil(graph):
        value = weight(graph, "blocks.1.ffn.down.weight")
        values = value.const_value.numpy().astype(np.float32) * 1.001
        value.const_value = ir.tensor(values.astype(np.float16), name=value.name)

    path = changed(path, spoil, tmp_path)
    assert not prove(path, originals["portable"][0], cases=FEW, file=file).passed


@pytest.mark.parametrize("factor", [0.05, 100.0])
def test_scales_of_an_int8_cache_that_clip_or_are_coarse_are_caught(
    factor, lesser, originals, tmp_path
):
    path, file = lesser["int8 cache"]
    path = changed(path, lambda graph: scale_weight(graph, "cache.1.key.scale", factor), tmp_path)
    proof = prove(path, originals["portable"][0], cases=FEW, file=file)
    assert proof.failure.startswith("stored cache.1.key: differs by 0.")
