"""The standard target: one buffer that stays, filled by TensorScatter."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from random_models import random_gpt
from test_options import TOGETHER, without
from torch import nn

from gptopt.errors import CheckFailed
from gptopt.export import export_model, prove
from gptopt.export.bisect import locate
from gptopt.export.targets import STANDARD
from gptopt.model import GPT
from gptopt.runtime import EdgeModel

FACTS = STANDARD.facts("onnx/model.onnx")


def kinds(path):
    return [node.op_type for node in ir.load(path).graph]


@pytest.mark.parametrize("name", ["llama", "alibi"])
def test_options_pass_the_proof_with_a_static_cache(name, export):
    model = random_gpt(**TOGETHER[name])
    path, build = export(model, STANDARD, told=True)
    onnx.checker.check_model(path, full_check=True)
    assert (build.target.cache, build.notes.entries) == ("static", [])
    proof = prove(path, model, file=FACTS)
    assert proof.passed, proof.failure
    assert {"left padding", "right padding", "rewind", "beam reorder", "last scores"} <= {
        each.case for each in proof.outcomes
    }
    assert proof.greedy.agreeing == 128
    for block in range(len(model.blocks)):
        assert not prove(path, without(model, block), cases=["prefill"], file=FACTS).passed


@pytest.fixture(scope="module")
def static(export):
    """A GPT-2: (model, path)."""
    model = random_gpt(tie_head=True)
    return model, export(model, STANDARD)


def test_only_standard_operators_of_opset_24(static):
    graph = ir.load(static[1])
    assert graph.graph.opset_imports == {"": 24}
    assert not {node.domain for node in graph.graph} - {""}
    assert kinds(static[1]).count("TensorScatter") == 4
    assert "Concat" not in kinds(static[1])
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if ".key" in value.name or ".value" in value.name:
            assert str(value.shape) == "[batch_size,4,max_sequence_length,8]"


def test_one_buffer_is_written_in_place_and_only_where_the_new_token_lies(static):
    session = onnxruntime.InferenceSession(static[1], providers=["CPUExecutionProvider"])
    cache = np.full((4, 1, 4, 11, 8), 7, np.float32)  # two layers, 11 columns
    binding = session.io_binding()
    for name, array in (
        ("input_ids", np.array([[5]])), ("attention_mask", np.ones((1, 4), np.int64)),
        ("position_ids", np.array([[3]])),
    ):  # fmt: skip
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    names = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    for name, part in zip(names, cache, strict=True):
        place = ("cpu", 0, np.float32, part.shape, part.ctypes.data)
        binding.bind_input(f"past_key_values.{name}", *place)
        binding.bind_output(f"present.{name}", *place)
    session.run_with_iobinding(binding)
    untouched = np.delete(cache, 3, axis=3)
    assert (untouched == 7).all()
    assert (cache[:, :, :, 3] != 7).all()


def test_no_memory_of_the_buffers_length_is_read(static):
    """What lies behind the text is NaN, in any number of columns."""
    model, path = static
    proof = prove(path, model, cases=["decode", "chunked prefill"], file=FACTS)
    assert proof.passed, proof.failure


class Peeking(nn.Module):
    """A model that counts its own cached tokens."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, ids, *, past=None, position_ids=None, **more):
        first = past[0][0].shape[2] if past else 0
        order = first + torch.arange(ids.shape[1])
        return self.inner(ids, past=past, position_ids=order.expand_as(ids), **more)


def test_a_model_that_reads_the_length_of_its_cache_keeps_a_growing_one(export):
    model = Peeking(random_gpt(n_layer=1)).eval()
    path, build = export(model, STANDARD, told=True)
    (note,) = build.notes.as_list()
    assert (note["where"], note["what"]) == ("cache", "no static cache")
    assert note["reason"].startswith("the model reads its cache, or the length of it, outside")
    assert build.target.cache == "growing"
    assert "TensorScatter" not in kinds(path)
    assert prove(path, model, cases=["prefill", "decode"]).passed


def test_a_masked_model_has_no_cache_to_keep(export):
    model = random_gpt(causal=False, n_layer=1)
    _, build = export(model, STANDARD, told=True)
    assert [note["reason"] for note in build.notes.as_list()] == ["an attention has no cache"]


def wrong_place(graph):
    """The second layer's values land one column too early."""
    node = [node for node in graph.graph if node.op_type == "TensorScatter"][3]
    one, zero = (
        ir.node("Constant", [], {"value": ir.tensor(np.array([n], np.int64))}) for n in (1, 0)
    )
    shifted = ir.node("Sub", [node.inputs[2], one.outputs[0]])
    clipped = ir.node("Max", [shifted.outputs[0], zero.outputs[0]])
    graph.graph.insert_before(node, [one, zero, shifted, clipped])
    node.replace_input_with(2, clipped.outputs[0])


def swapped(graph):
    """Keys and values of the first layer."""
    key, value = [node for node in graph.graph if node.op_type == "TensorScatter"][:2]
    first, second = key.inputs[1], value.inputs[1]
    key.replace_input_with(1, second)
    value.replace_input_with(1, first)


def other_scale(graph):
    """Of the second layer's attention."""
    node = [node for node in graph.graph if node.op_type == "Attention"][1]
    node.attributes.add(ir.AttrFloat32("scale", 0.4))


@pytest.mark.parametrize(
    ("fault", "layer"), [(wrong_place, 1), (swapped, 0), (other_scale, 1)],
    ids=lambda each: getattr(each, "__name__", ""),
)  # fmt: skip
def test_a_wrong_graph_is_caught_and_located(fault, layer, static, tmp_path):
    model, path = static
    graph = ir.load(path)
    fault(graph)
    wrong = tmp_path / "model.onnx"
    ir.save(graph, wrong)
    assert not prove(wrong, model, cases=["decode", "chunked prefill"], file=FACTS).passed
    found = locate(wrong, model, file=FACTS)
    assert found is not None
    assert found.layer == layer
    assert found.op_type in ("TensorScatter", "Attention")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported folder without a tokenizer, and its model."""
    path = tmp_path_factory.mktemp("static") / "edge"
    model = random_gpt(tie_head=True)
    report = export_model(model, None, path, target=STANDARD)
    assert report["cache"] == "static"
    return path, model


def test_the_card_says_how_the_cache_is_bound(folder):
    card = (folder[0] / "README.md").read_text()
    assert "`max_sequence_length` columns" in card
    assert "zeros at first" in card


def greedy(model: GPT, prompt, tokens):
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@torch.no_grad()
def test_the_runtime_plays_it_ragged_rewound_branched_and_saved(folder, tmp_path):
    from gptopt.config import SamplingOptions

    path, model = folder
    edge = EdgeModel(path)
    prompts = [[5, 6, 7, 8, 9], [11, 12], [13]]
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    wanted = [greedy(model, prompt, 12) for prompt in prompts]
    assert edge.generate(prompts, options, end_ids=()) == wanted
    cache = edge.new_cache(2)
    cache.read(prompts[:2])
    cache.read([[1, 2, 3], [4]])
    cache.rewind([5, 2])
    cache.save(tmp_path / "cache.safetensors")
    for each in (edge.load_cache(tmp_path / "cache.safetensors"), cache.branch([0, 1])):
        assert edge.generate(prompts[:2], options, end_ids=(), cache=each) == wanted[:2]


@torch.no_grad()
def test_scores_of_a_batch_behind_a_cache(folder):
    path, model = folder
    edge = EdgeModel(path)
    ids = np.random.default_rng(2).integers(0, 2048, (3, 9))
    _, past = edge.forward(ids[:, :5])
    scores, past = edge.forward(ids[:, 5:], past=past)
    assert past[0][0].shape == (3, 4, 9, 8)
    expected = model(torch.from_numpy(ids)).logits[:, 5:].numpy()
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_a_folder_that_claims_another_cache_is_refused(static):
    with pytest.raises(CheckFailed, match="not those of the contract"):
        prove(static[1], static[0])
