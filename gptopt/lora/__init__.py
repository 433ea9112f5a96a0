"""LoRA from end to end: put on a model, trained, kept in PEFT's layout, put on again or merged.

The layers themselves are gptopt.model.lora; nothing here knows of training or of export.
"""

from gptopt.lora.folder import (
    Adapter,
    is_adapter,
    load_adapter,
    put_on,
    save_adapter,
)
from gptopt.lora.layers import (
    apply_lora,
    base_of,
    begin,
    lora_modules,
    lora_parameters,
    merge_lora,
    names_of_layers,
)

__all__ = [
    "Adapter",
    "apply_lora",
    "base_of",
    "begin",
    "is_adapter",
    "load_adapter",
    "lora_modules",
    "lora_parameters",
    "merge_lora",
    "names_of_layers",
    "put_on",
    "save_adapter",
]
