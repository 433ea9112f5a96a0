"""Files that round inputs to int8: any random model passes, and a wrong graph does not."""

import numpy as np
import onnx_ir as ir
import pytest
from random_models import build_of, random_gpt

from gptopt.export.notes import Notes
from gptopt.export.pipeline import build_graph
from gptopt.export.quantize import quantize_graph
from gptopt.export.reference import Reference
from gptopt.export.stream import Claim
from gptopt.export.targets import PORTABLE
from gptopt.export.twin import held_by
from gptopt.export.validate import Outcome, pool, prove
from gptopt.export.write import save
from gptopt.precisions import PRECISIONS

LLAMA = {
    "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "bias": False,
}  # fmt: skip
# The first three failed by 1 to 23 % when each case was held to its own rounding errors alone.
MODELS = [
    (LLAMA, 1), ({"activation": "relu2", "norm_position": "post"}, 2), ({"activation": "relu2"}, 1),
    ({**LLAMA, "attn_softcap": 20.0, "logit_softcap": 30.0, "window": 9}, 0),
    ({"norm_position": "sandwich", "qk_norm": True}, 4),
]  # fmt: skip


def made(options, seed, precision, folder):
    model = random_gpt(seed, **options)
    build = build_of(model, PORTABLE)
    graph = quantize_graph(build_graph(model, model.config, build), PRECISIONS[precision], Notes())
    path = folder / "model.onnx"
    save(graph, path, external=False)
    return model, graph, path, build.target.facts("onnx/model.onnx")


@pytest.mark.parametrize(("options", "seed"), MODELS)
def test_any_random_model_passes_in_int8(options, seed, tmp_path):
    model, _, path, file = made(options, seed, "q8", tmp_path)
    proof = prove(path, model, file=file)
    assert proof.passed, proof.failure
    rounded = [each for each in proof.outcomes if "unrounded" not in each.case]
    # Errors of the size of PyTorch's, half of the budget: neither too tight nor without meaning.
    assert 0.15 < max(each.max_abs_error / each.budget for each in rounded) < 0.8


def test_a_scale_wrong_by_a_tenth_is_found(tmp_path):
    model, graph, path, file = made(LLAMA, 1, "q8", tmp_path)
    norm = next(node for node in graph.graph if "Normalization" in node.op_type)
    weight = norm.inputs[1]
    weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float32(1.1))
    save(graph, path, external=False)
    assert not prove(path, model, cases=["prefill"], file=file).passed


def test_a_text_is_rounded_alike_whatever_is_computed_beside_it(tmp_path):
    model, _, path, _ = made(LLAMA, 1, "q8", tmp_path)
    random = np.random.default_rng(0)
    texts = [tuple(random.integers(0, 2048, length).tolist()) for length in (3, 20, 40)]
    claims = [Claim(text, 0, np.zeros(()), 0, 0) for text in texts]
    reference = Reference(model, causal=True, held=held_by(path))
    together = reference.expect(claims)
    for ours, theirs in zip(together, reference.expect(claims[::-1])[::-1], strict=True):
        np.testing.assert_allclose(ours.single, theirs.single, atol=1e-4)
    alone = reference.expect(claims[:1])[0]
    # Its scale was that of the largest inputs of all texts, not of its own.
    assert np.abs(together[0].single - alone.single).max() > 1e-2


def test_pooled_errors_hold_every_case_to_the_largest():
    lucky = Outcome(case="a", band=0.0, distances=[(1.0, "here"), (3.0, "there")])
    other = Outcome(case="b", band=0.0, distances=[(0.5, "here")])
    lucky.settle(0.4)
    other.settle(1.2)
    assert (lucky.first_bad, other.first_bad) == ("here", None)
    pool([lucky, other])
    assert (lucky.first_bad, lucky.budget) == ("there", 2.4)
