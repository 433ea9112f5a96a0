"""Every option of a model exports, proves, and would fail the proof if a block were missing."""

import copy

import onnx
import pytest
import torch
from random_models import random_gpt

from gptopt.export import prove

# Together they hold every value of every option, in company.
TOGETHER = {
    "gpt2": {"tie_head": True},
    "classic": {"position": "sinusoidal", "norm_position": "post", "activation": "relu"},
    "llama": {
        "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2,
        "bias": False,
    },
    "sandwich": {
        "position": "rotary", "rotary_interleaved": True, "n_kv_head": 1, "activation": "geglu",
        "seed": 3, "norm_position": "sandwich", "norm": "rmsnorm", "qk_norm": True,
    },
    "alibi": {"position": "alibi", "activation": "gelu", "window": 7, "n_head": 6, "n_embd": 48},
    "none": {
        "position": "none", "activation": "relu2", "logit_softcap": 5.0, "attn_softcap": 2.0,
        "bias": False,
    },
    "window": {"position": "rotary", "window": 9, "attn_softcap": 3.0, "n_kv_head": 2},
    "head_dim": {"head_dim": 10, "norm_position": "sandwich", "tie_head": True},
}  # fmt: skip
MASKED = {
    "learned": {},
    "alibi": {"position": "alibi", "norm_position": "post", "tie_head": True},
    "rotary": {"position": "rotary", "norm": "rmsnorm", "n_kv_head": 2, "activation": "swiglu"},
}
ALONE = {
    **{f"position {p}": {"position": p} for p in ("sinusoidal", "rotary", "alibi", "none")},
    **{f"norm {p}": {"norm_position": p} for p in ("post", "sandwich")},
    **{f"ffn {a}": {"activation": a} for a in ("relu", "relu2", "gelu", "swiglu", "geglu")},
    "rmsnorm": {"norm": "rmsnorm"},
    "tied": {"tie_head": True},
    "no bias": {"bias": False},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "softcap": {"attn_softcap": 3.0},
    "logit softcap": {"logit_softcap": 4.0},
    "qk norm": {"qk_norm": True},
    "interleaved": {"position": "rotary", "rotary_interleaved": True},
    "one layer": {"n_layer": 1},
    "short context": {"block_size": 3},
    "context of one": {"block_size": 1},
    "odd sizes": {"n_head": 3, "n_embd": 33, "vocab_size": 77, "block_size": 29},
}


def without(model, block):
    """The model with a block that writes nothing."""
    maimed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in maimed.blocks[block].named_parameters():
            if "proj" in name or "down" in name:
                parameter.zero_()
    return maimed


@pytest.mark.parametrize("options", TOGETHER.values(), ids=TOGETHER)
def test_causal_model_exports_and_the_proof_can_fail(options, export):
    model = random_gpt(**options)
    path = export(model)
    onnx.checker.check_model(path, full_check=True)
    proof = prove(path, model)
    assert proof.passed, proof.failure
    assert len(proof.outcomes) == 11
    assert proof.greedy.agreeing == proof.greedy.tokens == 128
    assert proof.greedy.distinct >= 64
    for block in range(len(model.blocks)):
        assert not prove(path, without(model, block), cases=["prefill"]).passed


@pytest.mark.parametrize("options", MASKED.values(), ids=MASKED)
def test_masked_model_exports_without_a_cache(options, export):
    model = random_gpt(causal=False, **options)
    path = export(model)
    onnx.checker.check_model(path, full_check=True)
    proof = prove(path, model)
    assert proof.passed, proof.failure
    assert proof.greedy is None
    names = [value.name for value in onnx.load(path).graph.input]
    assert names == ["input_ids", "attention_mask", "position_ids"]
    for block in range(len(model.blocks)):
        assert not prove(path, without(model, block), cases=["prefill"]).passed


@pytest.mark.slow
@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
def test_every_option_alone(options, export):
    model = random_gpt(**options)
    path = export(model)
    onnx.checker.check_model(path, full_check=True)
    proof = prove(path, model)
    assert proof.passed, proof.failure
