"""ort-cuda without a GPU: its kernels are looked up in a list, its decode step has fixed shapes."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from random_models import build_of, random_gpt
from test_options import TOGETHER

from gptopt.errors import CheckFailed, UserError
from gptopt.export import registry
from gptopt.export.notes import Notes
from gptopt.export.pipeline import build_graph
from gptopt.export.quantize import quantize_graph
from gptopt.export.registry import check_kernels
from gptopt.export.targets import ORT_CUDA, STANDARD
from gptopt.precisions import PRECISIONS, find_precisions


def half(**options):
    """A model's float16 graph for CUDA, and the notes."""
    model = random_gpt(**options)
    build = build_of(model, ORT_CUDA)
    graph = build_graph(model, model.config, build)
    return quantize_graph(graph, PRECISIONS["fp16"], build.notes), build


@pytest.fixture(scope="module")
def llama():
    """Rotary, grouped heads, gated."""
    return half(**TOGETHER["llama"])


def said(build, stage):
    return [note for note in build.notes.entries if note.stage == stage]


def test_every_node_has_a_cuda_kernel_and_the_note_says_where_it_was_looked_up(llama):
    graph, build = llama
    check_kernels(graph, build.target, build.notes)
    (note,) = said(build, "check")
    assert note.what == "kernels looked up among those of onnxruntime-gpu 1.31.1"
    assert note.reason.endswith("nothing was run on a GPU")


def test_bfloat16_has_kernels_on_cuda_but_none_for_the_proof():
    kinds = {}
    for name in (("", "MatMul"), ("com.microsoft", "GroupQueryAttention")):
        for where, kernels in (
            ("cuda", registry._listed()[1]), ("cpu", registry._kernels("CPUExecutionProvider"))
        ):  # fmt: skip
            every = [kind for kernel in kernels[name] for kind in kernel.types["T"]]
            kinds[where, name[1]] = "tensor(bfloat16)" in every
    assert kinds == {
        ("cuda", "MatMul"): True, ("cuda", "GroupQueryAttention"): True,
        ("cpu", "MatMul"): False, ("cpu", "GroupQueryAttention"): False,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"--precision bf16: .* is proven .* bfloat16; use fp16"):
        find_precisions("fp16,bf16")


def test_a_node_without_a_cuda_kernel_is_found():
    model = random_gpt(n_layer=1)
    build = build_of(model, ORT_CUDA)
    graph = build_graph(model, model.config, build)  # float32, which CUDA's GQA does not take
    with pytest.raises(CheckFailed) as caught:
        check_kernels(graph, ORT_CUDA, Notes())
    assert "CUDAExecutionProvider has no kernel" in str(caught.value)
    assert "GroupQueryAttention" in str(caught.value)


def test_the_list_is_of_operators_that_onnxruntime_knows():
    listed = registry._listed()[1]
    cpu = registry._kernels("CPUExecutionProvider")
    assert len(listed.keys() & cpu.keys()) > 120
    assert ("com.microsoft", "GroupQueryAttention") in listed.keys() & cpu.keys()
    assert listed.keys() <= registry._schemas().keys()


@pytest.mark.parametrize(
    ("options", "what", "reason"),
    [
        (TOGETHER["gpt2"], "a step can be captured", "not tried on a GPU"),
        (TOGETHER["sandwich"], "a step can be captured", "not tried on a GPU"),
        (TOGETHER["alibi"], "a step cannot", "depends on the length of attention_mask"),
        ({"head_dim": 10}, "a step cannot", "the cache grows"),
    ],
)
def test_what_a_cuda_graph_needs_is_told(options, what, reason):
    model = random_gpt(**options)
    build = build_of(model, ORT_CUDA)
    build_graph(model, model.config, build)
    (note,) = said(build, "cuda graph")
    assert note.what.startswith(what)
    assert note.reason.endswith(reason) or reason in note.reason


def test_a_copy_to_the_host_is_told(llama):
    from gptopt.export.cuda_graph import note_cuda_graph

    graph = llama[0].clone()
    node = next(node for node in graph.graph if node.op_type == "GroupQueryAttention")
    node.replace_input_with(6, node.inputs[5])  # a number that lies on the device
    notes = Notes()
    note_cuda_graph(graph, notes)
    assert notes.entries[0].reason.endswith("is copied to the host for GroupQueryAttention")


def test_a_step_has_fixed_shapes_and_says_the_same(llama, tmp_path):
    """The mask as long as the buffer, as a captured step needs it; here on the CPU."""
    path = tmp_path / "model.onnx"
    ir.save(llama[0], path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    random, M, P = np.random.default_rng(3), 24, 9
    ids = random.integers(0, 2048, (1, P + 4))
    names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in names)]

    def run(chunk, mask, first, cache):
        feeds = {
            "input_ids": chunk, "attention_mask": mask,
            "position_ids": np.arange(first, first + chunk.shape[1])[None],
        }  # fmt: skip
        logits, *present = session.run(outputs, {**feeds, **dict(zip(names, cache, strict=True))})
        return logits, present

    empty = [np.zeros((1, 2, 0, 8), np.float16)] * len(names)
    _, grown = run(ids[:, :P], np.ones((1, P), np.int64), 0, empty)
    fixed = [np.zeros((1, 2, M, 8), np.float16) for _ in names]
    for buffer, part in zip(fixed, grown, strict=True):
        buffer[:, :, :P] = part
    for at in range(P, P + 4):
        step = ids[:, at : at + 1]
        wanted, grown = run(step, np.ones((1, at + 1), np.int64), at, grown)
        mask = (np.arange(M) <= at).astype(np.int64)[None]
        logits, fixed = run(step, mask, at, fixed)
        assert all(part.shape == (1, 2, M, 8) for part in fixed)
        np.testing.assert_allclose(logits, wanted, atol=2e-3)


def test_a_target_for_other_providers_is_not_noted(export):
    _, build = export(random_gpt(n_layer=1), STANDARD, told=True)
    assert not said(build, "cuda graph")
