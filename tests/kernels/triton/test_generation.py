"""Generation with the decode kernels and the static cache: the tokens of the reference body."""

import pytest
import torch

from gptopt import decoders
from gptopt.config import ModelConfig, SamplingOptions
from gptopt.generate import generate_tokens
from gptopt.kernels.attention import triton_decode
from gptopt.model import GPT

PROMPTS = [[5, 9, 20, 31, 7], [3]]
MODELS = {
    "llama": {"position": "rotary", "n_kv_head": 1, "norm": "rmsnorm", "activation": "swiglu"},
    "alibi": {"position": "alibi", "window": 4, "attn_softcap": 3.0},
}


def build(kernels, device, **options):
    """A model whose greedy tokens vary with every cache entry."""
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 48}
    model = GPT(ModelConfig(**sizes, tie_head=False, **options), kernels=kernels)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        model.wte.weight.normal_()
    return model.to(device).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_decode_kernels_generate_the_references_tokens(device, monkeypatch, name):
    steps = []
    real = triton_decode.launch
    monkeypatch.setattr(
        triton_decode,
        "launch",
        lambda kernel, *a, **o: steps.append(kernel) or real(kernel, *a, **o),
    )
    made, init = [], decoders._Step.__init__
    monkeypatch.setattr(
        decoders._Step, "__init__", lambda self, *a: made.append(self) or init(self, *a)
    )
    sampling = SamplingOptions(temperature=0, max_new_tokens=12)

    def tokens(kernels, static):
        model = build(kernels, device, **MODELS[name])
        done = generate_tokens(model, PROMPTS, sampling, context="slide", static_cache=static)
        return [row.tokens for row in done.rows]

    expected = tokens("reference", static=False)
    assert tokens("reference", static=True) == expected
    assert not steps
    assert tokens("triton", static=True) == expected  # the context slides once on the way
    assert steps
    if device.type == "cuda":
        assert all(step._graph is not None for step in made), "a step was not captured"
    assert len({token for row in expected for token in row}) > 8
