"""nanoGPT as a peer of a whole step: its own model from its own file, with our weights."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from gptopt.bench.contenders import Unavailable
from gptopt.model import GPT


def load_peer(folder: Path) -> Any:
    """The module model.py of a checkout.

    Raises:
        Unavailable: it is no Python module.
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    if spec is None or spec.loader is None:
        raise Unavailable(f"{folder / 'model.py'} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


_PEER_NAMES = {
    "norm_1": "ln_1", "norm_2": "ln_2", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
    "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj",
}  # fmt: skip


def peer_weights(model: GPT) -> dict[str, Tensor]:
    """Our weights under nanoGPT's names; both keep linear weights as (out, in)."""
    weights = {"lm_head.weight": model.wte.weight.detach()}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            part, _, leaf = rest.rpartition(".")
            theirs = f"transformer.h.{layer}.{_PEER_NAMES[part]}.{leaf}"
        else:
            theirs = "transformer." + name.replace("norm.", "ln_f.")
        weights[theirs] = parameter.detach()
    return weights
