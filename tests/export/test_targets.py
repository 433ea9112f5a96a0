"""Every target: its graphs pass their proof, stay small, and hold only what its runtime runs."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from random_models import random_gpt
from test_options import ALONE, MASKED, TOGETHER, without

from gptopt.errors import CheckFailed, UserError
from gptopt.export import prove
from gptopt.export.notes import Notes
from gptopt.export.registry import check_kernels
from gptopt.export.targets import (
    LEGACY,
    ORT_CPU,
    PORTABLE,
    STANDARD,
    TARGETS,
    WEB,
    check_precisions,
    find_targets,
    tell_size,
)

EVERY = (PORTABLE, ORT_CPU, STANDARD, LEGACY)
# A few in the default run, which hold every form of attention, norm, gelu and rotary that a target
# writes; the slow ones below are every option with every target.
CHOSEN = [
    ("sandwich", PORTABLE), ("alibi", ORT_CPU), ("window", ORT_CPU), ("llama", LEGACY),
    ("head_dim", PORTABLE),
]  # fmt: skip


def exported(export, options, target):
    model = random_gpt(**options)
    path, build = export(model, target, told=True)
    return model, path, build


def check(model, path, build):
    proof = prove(path, model, file=build.target.facts("onnx/model.onnx"))
    assert proof.passed, proof.failure
    if model.config.causal:
        assert proof.greedy.agreeing == proof.greedy.tokens
    for block in range(len(model.blocks)):
        assert not prove(path, without(model, block), cases=["prefill"]).passed
    return proof


@pytest.mark.parametrize(("name", "target"), CHOSEN, ids=lambda each: getattr(each, "name", each))
def test_options_pass_the_proof_of_a_target(name, target, export):
    model, path, build = exported(export, TOGETHER[name], target)
    proof = check(model, path, build)
    cases = {each.case for each in proof.outcomes}
    shared = build.target.cache == "shared"
    assert shared == (name != "head_dim" and target is not LEGACY)
    assert ("growing cache" in cases) == shared
    assert ("left padding" in cases) == (build.target.padding == "any")
    assert ("last scores" in cases) == (target is not LEGACY)


@pytest.mark.slow
@pytest.mark.parametrize("target", EVERY, ids=lambda each: each.name)
@pytest.mark.parametrize("name", [*TOGETHER, *ALONE, *(f"masked {name}" for name in MASKED)])
def test_every_option_passes_the_proof_of_every_target(name, target, export):
    options = {**TOGETHER, **ALONE}.get(name)
    if options is None:
        options = {**MASKED[name.removeprefix("masked ")], "causal": False}
    model, path, build = exported(export, options, target)
    proof = prove(path, model, file=build.target.facts("onnx/model.onnx"))
    assert proof.passed, proof.failure


@pytest.fixture(scope="module")
def portable(export):
    """A GPT-2 with a tied head for the portable target."""
    return exported(export, {"tie_head": True}, PORTABLE)


@pytest.fixture(scope="module")
def ort_cpu(export):
    """The same for our own runtime on a CPU."""
    return exported(export, {"tie_head": True}, ORT_CPU)


def kinds(path):
    return [node.op_type for node in ir.load(path).graph]


def test_a_layer_of_gpt2_is_a_few_nodes(portable, ort_cpu):
    for (model, path, _), layer, rest in ((portable, 10, 21), (ort_cpu, 14, 15)):
        assert len(kinds(path)) <= layer * len(model.blocks) + rest
    assert "Split" in kinds(portable[1])
    assert "Split" not in kinds(ort_cpu[1])


def test_gpt2_is_fused(portable, ort_cpu):
    for _, path, build in (portable, ort_cpu):
        found = kinds(path)
        assert found.count("GroupQueryAttention") == found.count("FastGelu") == 2
        fused = build.target.name == "portable"
        norms = "SkipLayerNormalization" if fused else "LayerNormalization"
        assert found.count(norms) == 5
        assert not {"Gelu", "Attention", "Reshape"} & set(found)
        assert fused == ("LayerNormalization" not in found)
        assert build.notes.entries == []
        assert ir.load(path).graph.opset_imports == {"": 21, "com.microsoft": 1}


def test_the_bias_of_padding_is_built_once_and_only_where_padding_stays(portable, ort_cpu):
    attentions = [
        [node for node in ir.load(path).graph if node.op_type == "GroupQueryAttention"]
        for _, path, _ in (portable, ort_cpu)
    ]
    assert len({node.inputs[10] for node in attentions[0]}) == 1
    assert all(len(node.inputs) <= 10 for node in attentions[1])


def test_a_model_that_gqa_cannot_run_says_why(export):
    _, path, build = exported(export, {"head_dim": 10}, ORT_CPU)
    (note,) = (each for each in build.notes.entries if each.stage == "lower")
    assert note.reason.endswith("wants heads of a multiple of 8 channels, not 10")
    assert "Attention" in kinds(path)
    assert (build.target.cache, build.target.padding) == ("growing", "any")


def test_legacy_holds_nothing_newer_than_opset_17(export):
    import onnx

    model, path, build = exported(
        export, {"norm": "rmsnorm", "activation": "geglu", "n_kv_head": 2}, LEGACY
    )
    loaded = onnx.load(path)
    assert [(each.domain, each.version) for each in loaded.opset_import] == [("", 17)]
    assert loaded.ir_version == 8
    onnx.checker.check_model(path, full_check=True)
    check(model, path, build)


def test_a_node_without_a_kernel_is_one_line(portable):
    graph = ir.load(portable[1])
    node = next(node for node in graph.graph if node.op_type == "FastGelu")
    node.op_type = "QuickestGelu"
    node.name = "mine"
    with pytest.raises(CheckFailed) as caught:
        check_kernels(graph, PORTABLE, Notes())
    assert str(caught.value).startswith(
        "--target portable: CPUExecutionProvider has no kernel for node 'mine': "
        "com.microsoft.QuickestGelu at opset 1 with tensor(float); "
    )


def test_types_that_no_kernel_takes_together_are_found(portable):
    graph = ir.load(portable[1])
    gathers = [node for node in graph.graph if node.op_type == "Gather"]
    for name in ("wte.weight", "wpe.weight"):
        weight = graph.graph.initializers[name]
        weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float16), name=name)
        weight.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in gathers:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(
        CheckFailed, match=r"SkipLayerNormalization at opset 1 with tensor.float., "
    ):
        check_kernels(graph, PORTABLE, Notes())


def test_unknown_targets_are_refused():
    assert find_targets("ort-cpu, portable,ort-cpu") == [ORT_CPU, PORTABLE]
    for wrong in ("mobile", "portable,mobile", ""):
        with pytest.raises(UserError, match="expected one or more of portable, ort-cpu"):
            find_targets(wrong)


def test_a_precision_that_a_target_lacks_says_which_has_it():
    check_precisions(WEB, ["fp32", "q4f16"])
    with pytest.raises(UserError) as caught:
        check_precisions(LEGACY, ["fp32", "q4"])
    assert str(caught.value) == (
        "--precision q4: --target legacy has fp32; q4 runs with --target portable or ort-cpu or web"
    )


def test_targets_are_named_as_they_are_found():
    assert all(name == target.name for name, target in TARGETS.items())
    for target in TARGETS.values():
        fitted = dataclasses.replace(target.growing(), name=target.name)
        assert fitted.cache == "growing"
        assert fitted.opset >= 23


def test_a_file_too_large_for_a_browser_is_told_in_a_line(tmp_path, caplog):
    assert WEB.largest_bytes == 2**31
    small = dataclasses.replace(WEB, largest_bytes=100)
    path, notes = tmp_path / "model.onnx", Notes()
    path.write_bytes(bytes(40))
    (tmp_path / "model_q4.onnx").write_bytes(bytes(400))
    tell_size(small, path, notes)
    assert (notes.entries, caplog.messages) == ([], [])
    path.with_name("model.onnx_data").write_bytes(bytes(61))
    for target in (WEB, dataclasses.replace(PORTABLE), small):
        tell_size(target, path, notes)
    (told,) = caplog.messages
    assert told == (
        "model.onnx: 101 bytes, too many for a browser; --target web loads up to 100; choose fewer "
        "bits"
    )
    assert [each.where for each in notes.entries] == ["model.onnx"]
