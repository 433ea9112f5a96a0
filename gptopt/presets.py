"""Models by name, for --preset: table-sized, so that the options themselves can be read."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "gpt-tiny": {
        "description": "4 layers x 128 channels, context 128: minutes on a laptop",
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128},
    },
    "transformer-2017": {
        "description": "the classic decoder: ReLU, post-norm, sinusoidal positions",
        "model": {
            "n_layer": 6, "n_head": 8, "n_embd": 512, "n_inner": 2048, "block_size": 512,
            "activation": "relu", "norm_position": "post", "position": "sinusoidal", "dropout": 0.1,
        },
    },
    "gpt2": {
        "description": "GPT-2 124M",
        "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    },
    "gpt2-medium": {
        "description": "GPT-2 355M",
        "model": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024},
    },
    "gpt2-large": {
        "description": "GPT-2 774M",
        "model": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024},
    },
    "gpt2-xl": {
        "description": "GPT-2 1.5B",
        "model": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024},
    },
    "llama-110m": {
        "description": "llama-like 110M: rotary, RMSNorm, SwiGLU, no biases",
        "model": {
            "n_layer": 12, "n_head": 12, "n_kv_head": 12, "n_embd": 768, "n_inner": 2048,
            "block_size": 1024, "bias": False, "activation": "swiglu", "norm": "rmsnorm",
            "position": "rotary",
        },
    },
    "llama-1b": {
        "description": "llama-like 1B with grouped queries",
        "model": {
            "n_layer": 16, "n_head": 32, "n_kv_head": 8, "n_embd": 2048, "n_inner": 8192,
            "block_size": 2048, "bias": False, "activation": "swiglu", "norm": "rmsnorm",
            "position": "rotary", "rotary_base": 500000.0,
        },
    },
}  # fmt: skip
