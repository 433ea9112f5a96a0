"""A masked language model has the same contract, without a cache, for every target."""

import onnx_ir as ir
import pytest
from random_models import random_gpt

from gptopt.export import prove
from gptopt.export.targets import TARGETS

# CUDA's files are float16, which test_cuda.py holds.
ON_THE_CPU = [target for target in TARGETS.values() if "fp32" in target.precisions]


@pytest.mark.parametrize("target", ON_THE_CPU, ids=lambda each: each.name)
def test_a_masked_model_keeps_one_contract(target, export):
    model = random_gpt(causal=False, n_layer=1)
    path, build = export(model, target, told=True)
    graph = ir.load(path).graph
    names = [value.name for value in graph.inputs if not value.is_initializer()]
    assert names == ["input_ids", "attention_mask", "position_ids"]
    assert [value.name for value in graph.outputs] == ["logits"]
    assert str(graph.inputs[1].shape) == "[batch_size,sequence_length]"
    file = build.target.facts("onnx/model.onnx")
    assert (file.cache, file.padding) == ("growing", "any")
    cases = ["prefill", "left padding", "right padding"]
    proof = prove(path, model, file=file, cases=cases)
    assert proof.passed, proof.failure
    assert len(proof.outcomes) == len(cases)
