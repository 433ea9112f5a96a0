"""Weights: Hugging Face's names and layouts for gpt2 and llama models, both ways."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gptopt.config import ModelConfig
from gptopt.hf.config import OWN


class Weight(NamedTuple):
    """One of our weights and where it stands in a file: the parts are joined along the rows."""

    own: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]  # rows of each part
    transposed: bool  # the file holds (in, out), as gpt2's Conv1D does

    def shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """Shapes of the parts in the file, where our weight has `shape`."""
        rest = tuple(shape[1:])
        return [(*rest, rows) if self.transposed else (rows, *rest) for rows in self.rows]

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Our weight from its parts."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return joined.t().contiguous() if self.transposed else joined

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of our weight under their names in the file."""
        pieces = torch.split(tensor, list(self.rows))
        return {
            name: (piece.t() if self.transposed else piece).contiguous()
            for name, piece in zip(self.parts, pieces, strict=True)
        }


# Our module -> theirs. Beside a block's modules stand those of the model.
_MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "wte": ("wte",), "wpe": ("wpe",), "norm": ("ln_f",), "head": ("lm_head",),
        "norm_1": ("ln_1",), "norm_2": ("ln_2",),
        "attn.qkv": ("attn.c_attn",), "attn.proj": ("attn.c_proj",),
        "ffn.up": ("mlp.c_fc",), "ffn.down": ("mlp.c_proj",),
    },
    "llama": {
        "wte": ("embed_tokens",), "norm": ("norm",), "head": ("lm_head",),
        "norm_1": ("input_layernorm",), "norm_2": ("post_attention_layernorm",),
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": ("self_attn.o_proj",),
        # Theirs is named after the gate that is activated; our `up` is the activated one.
        "ffn.up": ("mlp.gate_proj",), "ffn.gate": ("mlp.up_proj",), "ffn.down": ("mlp.down_proj",),
    },
}  # fmt: skip
_BLOCKS = {"gpt2": "h", "llama": "layers"}
_PREFIXES = {"gpt2": "transformer.", "llama": "model."}
_BUFFERS = {
    "gpt2": re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
    "llama": re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
}
HEAD = "lm_head.weight"


def weights(
    config: ModelConfig, architecture: str, shapes: Mapping[str, torch.Size]
) -> list[Weight]:
    """Where each of our weights (names and shapes of the model's state) stands in a file.

    Names are without the prefix ("transformer.", "model.") that `stored_name` adds.
    """
    return [_weight(config, architecture, own, shape[0]) for own, shape in shapes.items()]


def _weight(config: ModelConfig, architecture: str, own: str, rows: int) -> Weight:
    if architecture == OWN:
        return Weight(own, (own,), (rows,), False)
    module, kind = own.rsplit(".", 1)
    place = ""
    if module.startswith("blocks."):
        _, index, module = module.split(".", 2)
        place = f"{_BLOCKS[architecture]}.{index}."
    parts = tuple(f"{place}{name}.{kind}" for name in _MODULES[architecture][module])
    if len(parts) == 3:
        H, K, D = config.n_head, config.kv_heads, config.head_size
        return Weight(own, parts, (H * D, K * D, K * D), False)
    conv1d = architecture == "gpt2" and bool(place) and kind == "weight" and "norm" not in module
    return Weight(own, parts, (rows,), conv1d)


def stored_name(architecture: str, name: str) -> str:
    """The name that transformers writes for one of `weights`."""
    return name if architecture == OWN or name == HEAD else _PREFIXES[architecture] + name


def plain_names(architecture: str, stored: Iterable[str]) -> dict[str, str]:
    """Names without prefix -> names as stored, leaving out buffers that are no weights.

    A stored name that would stand for the same weight as another keeps its own name.
    """
    if architecture == OWN:
        return {name: name for name in stored}
    plain: dict[str, str] = {}
    for name in stored:
        short = name.removeprefix(_PREFIXES[architecture])
        if not _BUFFERS[architecture].fullmatch(short):
            plain[name if short in plain else short] = name
    return plain
