"""gptopt: a GPT from text to the edge. Importing it loads no torch, triton or onnx.

The public names are resolved when first used:

    from gptopt import GPT, ModelConfig, Tokenizer, load_model, EdgeModel
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CheckFailed": "gptopt.errors",
    "UserError": "gptopt.errors",
    "ModelConfig": "gptopt.config",
    "SamplingOptions": "gptopt.config",
    "TrainOptions": "gptopt.config",
    "Tokenizer": "gptopt.tokenizer",
    "EdgeModel": "gptopt.runtime",
    "GPT": "gptopt.model",
    "load_model": "gptopt.checkpoint",
    "save_model": "gptopt.checkpoint",
    "export_model": "gptopt.export",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
