"""Graphs that are wrong on purpose: the proof has to catch every one of them."""

import numpy as np
import onnx_ir as ir
import pytest

from gptopt.errors import CheckFailed
from gptopt.export import prove


def nodes(model, op_type):
    found = [node for node in model.graph if node.op_type == op_type]
    assert found, f"no {op_type} to change"
    return found


def insert(model, before, op_type, inputs, **attributes):
    """A new node in front of another one; its value."""
    node = ir.node(op_type, inputs, attributes)
    model.graph.insert_before(before, node)
    return node.outputs[0]


def constant(model, before, value):
    return insert(model, before, "Constant", [], value=ir.tensor(value))


def weight(model, ending):
    """The first weight whose name ends like this."""
    return next(v for name, v in model.graph.initializers.items() if name.endswith(ending))


def scale_weight(model, ending, factor):
    value = weight(model, ending)
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array * np.float32(factor)).astype(array.dtype))


def set_float(node, name, value):
    node.attributes.add(ir.AttrFloat32(name, value))


def swap_k_and_v(model):
    node = nodes(model, "Attention")[1]
    k, v = node.inputs[1:3]
    node.replace_input_with(1, v)
    node.replace_input_with(2, k)


def swap_caches_of_two_layers(model):
    first, second = nodes(model, "Attention")
    for index in (4, 5):
        a, b = first.inputs[index], second.inputs[index]
        first.replace_input_with(index, b)
        second.replace_input_with(index, a)


def swap_key_and_value_outputs(model):
    node = nodes(model, "Attention")[0]
    key, value = node.outputs[1:3]
    outputs = model.graph.outputs
    i, j = outputs.index(key), outputs.index(value)
    outputs[i], outputs[j] = value, key
    key.name, value.name = value.name, key.name


def no_padding_mask(model):
    node = nodes(model, "And")[0]  # (causal, padding)
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def always(model, node):
    """Make a comparison true everywhere."""
    value, users = node.outputs[0], list(node.outputs[0].uses())
    negated = insert(model, users[0].node, "Not", [value])
    true = insert(model, users[0].node, "Or", [value, negated])
    for use in users:
        use.node.replace_input_with(use.idx, true)


def no_causal_mask(model):
    always(model, nodes(model, "LessOrEqual")[0])


def no_window(model):
    always(model, nodes(model, "Less")[0])


def window_off_by_one(model):
    node = nodes(model, "Less")[0]
    limit = node.inputs[1].const_value.numpy()
    node.replace_input_with(1, constant(model, node, limit + 1))


def causal_off_by_one(model):
    node = nodes(model, "LessOrEqual")[0]
    ir.convenience.replace_all_uses_with(node.outputs[0], insert(model, node, "Less", node.inputs))


def distances_count_padding(model):
    """The window measured in cache slots, not in real tokens."""
    node = nodes(model, "CumSum")[0]
    zeros = insert(model, node, "Sub", [node.inputs[0], node.inputs[0]])
    ones = insert(model, node, "Add", [zeros, constant(model, node, np.int64(1))])
    node.replace_input_with(0, ones)


def position_off_by_one(model):
    node = nodes(model, "Gather")[1]
    assert node.inputs[1].name == "position_ids"
    shifted = insert(model, node, "Sub", [node.inputs[1], constant(model, node, np.int64(1))])
    zero = constant(model, node, np.int64(0))
    node.replace_input_with(1, insert(model, node, "Max", [shifted, zero]))


def erf_gelu(model):
    nodes(model, "Gelu")[0].attributes.add(ir.AttrString("approximate", "none"))


def another_epsilon(model):
    set_float(nodes(model, "LayerNormalization")[0], "epsilon", 1e-3)


def another_rms_epsilon(model):
    set_float(nodes(model, "RMSNormalization")[0], "epsilon", 1e-3)


def another_scale(model):
    node = nodes(model, "Attention")[0]
    set_float(node, "scale", node.attributes["scale"].as_float() * 1.01)


def no_softcap(model):
    del nodes(model, "Attention")[1].attributes["softcap"]


def no_logit_softcap(model):
    node = nodes(model, "Tanh")[0]
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def other_rotary_pairs(model):
    nodes(model, "RotaryEmbedding")[0].attributes.add(ir.AttrInt64("interleaved", 1))


def unrotated_keys(model):
    node = nodes(model, "RotaryEmbedding")[1]
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def ungated_ffn(model):
    node = nodes(model, "Sigmoid")[0]
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def lost_residual(model):
    norm = nodes(model, "LayerNormalization")[1]
    add = norm.inputs[0].producer()
    norm.replace_input_with(0, add.inputs[0])


def zero(ending):
    return lambda model: scale_weight(model, ending, 0)


def slightly_off(ending):
    return lambda model: scale_weight(model, ending, 1.001)


def symmetric_alibi(model):
    """Distances with a sign: later keys would be favoured."""
    node = nodes(model, "Abs")[0]
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def no_alibi(model):
    node = nodes(model, "Abs")[0]
    ir.convenience.replace_all_uses_with(node.outputs[0], insert(model, node, "Sub", [
        node.inputs[0], node.inputs[0]]))  # fmt: skip


GPT2 = {
    "k and v swapped": swap_k_and_v,
    "caches of two layers swapped": swap_caches_of_two_layers,
    "key and value outputs swapped": swap_key_and_value_outputs,
    "no padding mask": no_padding_mask,
    "no causal mask": no_causal_mask,
    "causal off by one": causal_off_by_one,
    "position off by one": position_off_by_one,
    "erf gelu": erf_gelu,
    "another epsilon": another_epsilon,
    "another scale": another_scale,
    "lost residual": lost_residual,
    "qkv bias dropped": zero("blocks.0.attn.qkv.bias"),
    "proj bias dropped": zero("blocks.1.attn.proj.bias"),
    "up bias dropped": zero("blocks.0.ffn.up.bias"),
    "down bias dropped": zero("blocks.1.ffn.down.bias"),
    "norm bias dropped": zero("norm.bias"),
    "attention zeroed": zero("blocks.0.attn.proj.weight"),
    "ffn zeroed": zero("blocks.1.ffn.down.weight"),
    "a weight 0.1 % off": slightly_off("blocks.0.ffn.up.weight"),
    "a norm 0.1 % off": slightly_off("blocks.1.norm_1.weight"),
}
LLAMA = {
    "no padding mask": no_padding_mask,
    "no window": no_window,
    "window off by one": window_off_by_one,
    "distances count padding": distances_count_padding,
    "another rms epsilon": another_rms_epsilon,
    "no softcap": no_softcap,
    "no logit softcap": no_logit_softcap,
    "other rotary pairs": other_rotary_pairs,
    "unrotated keys": unrotated_keys,
    "ungated ffn": ungated_ffn,
    "caches of two layers swapped": swap_caches_of_two_layers,
}
ALIBI = {
    "signed distances": symmetric_alibi,
    "no alibi": no_alibi,
    "k and v swapped": swap_k_and_v,
    "ffn zeroed": zero("blocks.0.ffn.down.weight"),
}


# What is caught by some of the cases is caught by all.
FEW = ("prefill", "decode", "left padding", "right padding")


def check(original, mutate, folder, cases=FEW):
    model, path = original
    graph = ir.load(path)
    mutate(graph)
    changed = folder / "model.onnx"
    ir.save(graph, changed)
    proof = prove(changed, model, cases=cases)
    assert not proof.passed
    assert proof.failure
    return proof


@pytest.mark.parametrize("mutate", GPT2.values(), ids=GPT2)
def test_wrong_gpt2_is_caught(mutate, gpt2, tmp_path):
    check(gpt2, mutate, tmp_path)


@pytest.mark.parametrize("mutate", LLAMA.values(), ids=LLAMA)
def test_wrong_llama_is_caught(mutate, llama, tmp_path):
    check(llama, mutate, tmp_path)


@pytest.mark.parametrize("mutate", ALIBI.values(), ids=ALIBI)
def test_wrong_bidirectional_model_is_caught(mutate, alibi, tmp_path):
    check(alibi, mutate, tmp_path)


def test_unchanged_graphs_pass(gpt2, llama, alibi, tmp_path):
    for model, path in (gpt2, llama, alibi):
        graph = ir.load(path)
        ir.save(graph, tmp_path / "model.onnx")
        proof = prove(tmp_path / "model.onnx", model)
        assert proof.passed, proof.failure


def test_a_mask_fault_shows_in_the_cases_that_are_about_it(gpt2, tmp_path):
    proof = check(gpt2, no_padding_mask, tmp_path, cases=None)
    failed = {outcome.case for outcome in proof.outcomes if not outcome.passed}
    assert failed == {"left padding", "right padding"}
    assert proof.failure.startswith("left padding: logit error ")
    assert "first exceeded at token 0 of row 1" in proof.failure
    assert "budget" in proof.failure


def test_a_cache_fault_leaves_plain_prefill_intact(gpt2, tmp_path):
    proof = check(gpt2, swap_caches_of_two_layers, tmp_path, cases=None)
    passed = {outcome.case for outcome in proof.outcomes if outcome.passed}
    assert passed >= {"prefill", "batch"}
    assert not passed & {"decode", "chunked prefill", "beam reorder", "rewind", "greedy"}
    assert proof.greedy.first_bad is not None


def test_nan_is_caught(gpt2, tmp_path):
    proof = check(gpt2, lambda graph: scale_weight(graph, "norm.bias", np.nan), tmp_path)
    assert proof.worst.max_abs_error == float("inf")


CONTRACT = {
    "batch renamed": lambda graph: rename(graph, "batch_size", "batch"),
    "ir too new": lambda graph: setattr(graph, "ir_version", 99),
    "opset too new": lambda graph: graph.graph.opset_imports.update({"": 99}),
    "an output is missing": lambda graph: graph.graph.outputs.pop(),
    "logits of the last token only": lambda graph: last_only(graph),
    "an input is unknown": lambda graph: setattr(graph.graph.inputs[1], "name", "mask"),
}


def rename(graph, old, new):
    value = graph.graph.inputs[0]
    value.shape = ir.Shape([new if str(dim) == old else dim for dim in value.shape])


def last_only(graph):
    logits = graph.graph.outputs[0]
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


@pytest.mark.parametrize("break_it", CONTRACT.values(), ids=CONTRACT)
def test_a_broken_contract_is_one_line(break_it, gpt2, tmp_path):
    model, path = gpt2
    graph = ir.load(path)
    break_it(graph)
    ir.save(graph, tmp_path / "model.onnx")
    with pytest.raises(CheckFailed) as caught:
        prove(tmp_path / "model.onnx", model)
    assert "\n" not in str(caught.value)
    assert "model.onnx" in str(caught.value)
