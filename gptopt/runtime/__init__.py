"""The edge: an exported folder checked, loaded in onnxruntime and sampled from, with no PyTorch.

Names are loaded when first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptopt.runtime.edge import EdgeModel
    from gptopt.runtime.generation import Completion, Generated, complete

__all__ = ["Completion", "EdgeModel", "Generated", "complete"]

_HOMES = {
    "EdgeModel": "gptopt.runtime.edge",
    "Completion": "gptopt.runtime.generation",
    "Generated": "gptopt.runtime.generation",
    "complete": "gptopt.runtime.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
