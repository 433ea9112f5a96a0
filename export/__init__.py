"""PyTorch to ONNX: trace, lower, clean, package, prove; each stage a function of its own.

Names are loaded when first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptopt.export.contract import Contract
    from gptopt.export.package import export_model
    from gptopt.export.validate import Proof, prove

__all__ = ["Contract", "Proof", "export_model", "prove"]

_HOMES = {
    "Contract": "gptopt.export.contract",
    "Proof": "gptopt.export.validate",
    "export_model": "gptopt.export.package",
    "prove": "gptopt.export.validate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
