"""Tiny models of several shapes, and adapters on them that matter."""

import torch

from gptopt.config import ModelConfig
from gptopt.lora import lora_parameters
from gptopt.model import GPT

LLAMA = {
    "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2,
}  # fmt: skip
SHAPES = {
    "gpt2": {},
    "llama": LLAMA,
    "llama_biased": LLAMA | {"bias": True, "activation": "geglu"},
    "own": {"position": "alibi", "norm_position": "sandwich", "activation": "relu2"},
}


def tiny(shape, seed=0):
    """A random model in which every weight counts."""
    config = ModelConfig(
        n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=64, **SHAPES[shape]
    )
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config, kernels="reference").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = "norm" in name and name.endswith("weight")
            parameter.copy_(one + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model, seed=1):
    """Give an adapter the values that training might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
