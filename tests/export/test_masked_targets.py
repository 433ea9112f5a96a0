"""A masked language model has the same contract, without a cache, for every target."""

import onnx_ir as ir
import pytest
from random_models import build_of, random_gpt

from gptopt.export import prove
from gptopt.export.pipeline import build_graph
from gptopt.export.quantize import quantize_graph
from gptopt.export.registry import check_kernels
from gptopt.export.targets import TARGETS
from gptopt.precisions import PRECISIONS


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_masked_model_keeps_one_contract(target, tmp_path):
    model = random_gpt(causal=False, n_layer=1)
    build, path = build_of(model, target), tmp_path / "model.onnx"
    made = build_graph(model, model.config, build)
    if target.precisions[0] != "fp32":  # CUDA's, looked up among its kernels and proven on the CPU
        made = quantize_graph(made, PRECISIONS[target.precisions[0]], build.notes)
        check_kernels(made, build.target, build.notes)
    ir.save(made, path)
    graph = made.graph
    names = [value.name for value in graph.inputs if not value.is_initializer()]
    assert names == ["input_ids", "attention_mask", "position_ids"]
    assert [value.name for value in graph.outputs] == ["logits"]
    assert str(graph.inputs[1].shape) == "[batch_size,sequence_length]"
    file = build.target.facts("onnx/model.onnx", PRECISIONS[target.precisions[0]].floats)
    assert (file.cache, file.padding) == ("growing", "any")
    cases = ["prefill", "left padding", "right padding"]
    proof = prove(path, model, file=file, cases=cases)
    assert proof.passed, proof.failure
    assert {each.case.partition(" (")[0] for each in proof.outcomes} == set(cases)
