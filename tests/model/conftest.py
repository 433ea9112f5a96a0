"""Tiny models of every option, with weights that make each block count."""

import pytest
import torch

from gptopt.config import ModelConfig
from gptopt.model import GPT

TINY = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 96}
LLAMA = {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False}

# Every option of a GPT by itself, and mixtures in which options meet.
OPTIONS = {
    "learned": {},
    "sinusoidal": {"position": "sinusoidal"},
    "rotary": {"position": "rotary"},
    "rotary_interleaved": {"position": "rotary", "rotary_interleaved": True},
    "alibi": {"position": "alibi"},
    "no_position": {"position": "none"},
    "rmsnorm": {"norm": "rmsnorm"},
    "post": {"norm_position": "post"},
    "sandwich": {"norm_position": "sandwich"},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "gelu": {"activation": "gelu"},
    "swiglu": {"activation": "swiglu"},
    "geglu": {"activation": "geglu"},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "window": {"window": 4},
    "attn_softcap": {"attn_softcap": 2.0},
    "logit_softcap": {"logit_softcap": 3.0},
    "qk_norm": {"qk_norm": True},
    "untied": {"tie_head": False},
    "no_bias": {"bias": False},
    "head_dim": {"head_dim": 6},
    "llama": {**LLAMA, "n_kv_head": 2, "tie_head": False},
    "classic": {"norm_position": "post", "position": "sinusoidal", "activation": "relu"},
    "all_rotary": {
        **LLAMA, "norm_position": "sandwich", "n_kv_head": 2, "window": 5, "attn_softcap": 5.0,
        "logit_softcap": 9.0, "qk_norm": True, "tie_head": False,
    },
    "all_alibi": {
        "position": "alibi", "norm_position": "post", "n_kv_head": 1, "window": 3, "n_head": 3,
        "head_dim": 10, "activation": "geglu", "attn_softcap": 4.0,
    },
}  # fmt: skip


def shake(model):
    """Weights of a size at which every block, bias and norm changes the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.6 / parameter.shape[1] ** 0.5 + 0.1)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(params=OPTIONS)
def options(request):
    """The options of one model after another."""
    return OPTIONS[request.param]


@pytest.fixture(scope="session")
def build():
    """build(**options): a tiny shaken model in evaluation mode, in float64 unless told."""

    def build(*, dtype=torch.float64, seed=1, **options):
        torch.manual_seed(seed)
        return shake(GPT(ModelConfig(**{**TINY, **options}))).to(dtype).eval()

    return build
