"""Weights: Hugging Face's names and layouts for the architectures that we have, both ways."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gptopt.config import ModelConfig
from gptopt.hf.architectures import ARCHITECTURES, Architecture
from gptopt.hf.config import OWN


class Weight(NamedTuple):
    """Weights of ours and where they stand in a file: the same rows, cut in another way."""

    owns: tuple[str, ...]
    own_rows: tuple[int, ...]  # rows of each of ours
    parts: tuple[str, ...]
    rows: tuple[int, ...]  # rows of each part
    transposed: bool  # the file holds (in, out), as gpt2's Conv1D does

    def shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """Shapes of the parts in the file, where our (first) weight has `shape`."""
        rest = tuple(shape[1:])
        return [(*rest, rows) if self.transposed else (rows, *rest) for rows in self.rows]

    def join(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Our weights from the file's parts."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        joined = joined.t().contiguous() if self.transposed else joined
        return _cut(joined, self.owns, self.own_rows)

    def split(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """The file's parts from our weights."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        pieces = _cut(joined, self.parts, self.rows)
        if not self.transposed:
            return pieces
        return {name: piece.t().contiguous() for name, piece in pieces.items()}


def _cut(tensor: Tensor, names: tuple[str, ...], rows: tuple[int, ...]) -> dict[str, Tensor]:
    pieces = torch.split(tensor, list(rows))
    return {name: piece.contiguous() for name, piece in zip(names, pieces, strict=True)}


HEAD = "lm_head.weight"
SCORE = "score.weight"  # of a classifier's labels, the same name in transformers and here


def weights(
    config: ModelConfig, architecture: str, shapes: Mapping[str, torch.Size]
) -> list[Weight]:
    """Where each of our weights (names and shapes of the model's state) stands in a file.

    Names are without the prefix ("transformer.", "model.") that `stored_name` adds.
    """
    if architecture == OWN:
        return [
            Weight((own,), (shape[0],), (own,), (shape[0],), False) for own, shape in shapes.items()
        ]
    kind = ARCHITECTURES[architecture]
    shared = {ours: names for names in kind.modules for ours in names.split("+")}
    found = []
    for own in shapes:
        if own == SCORE:
            labels = (shapes[own][0],)
            found.append(Weight((own,), labels, (own,), labels, False))
            continue
        place, module, leaf = _address(own)
        together = shared[module].split("+")
        if module != together[0]:
            continue  # with the first of those that share a tensor
        owns = tuple(f"{place}{each}.{leaf}" for each in together)
        rows = tuple(shapes[each][0] for each in owns)
        found.append(_weight(config, kind, own, owns, rows))
    return found


def _address(own: str) -> tuple[str, str, str]:
    """(place of the block with a dot at its end, module within it, "weight" or "bias")."""
    module, leaf = own.rsplit(".", 1)
    if not module.startswith("blocks."):
        return "", module, leaf
    _, index, module = module.split(".", 2)
    return f"blocks.{index}.", module, leaf


def _weight(
    config: ModelConfig, kind: Architecture, own: str, owns: tuple[str, ...], rows: tuple[int, ...]
) -> Weight:
    place, module, leaf = _address(own)
    stored_place = place.replace("blocks", kind.blocks, 1)
    names = kind.modules["+".join(_address(each)[1] for each in owns)]
    parts = tuple(f"{stored_place}{name}.{leaf}" for name in names)
    if len(parts) == 3:
        H, K, D = config.n_head, config.kv_heads, config.head_size
        return Weight(owns, rows, parts, (H * D, K * D, K * D), False)
    conv1d = kind.keys == "gpt2" and bool(place) and leaf == "weight" and "norm" not in module
    return Weight(owns, rows, parts, (sum(rows),), conv1d)


def stored_name(architecture: str, name: str) -> str:
    """The name that transformers writes for one of `weights`."""
    if architecture == OWN or name in (HEAD, SCORE):
        return name
    return ARCHITECTURES[architecture].prefix + name


def plain_names(architecture: str, stored: Iterable[str]) -> dict[str, str]:
    """Names without prefix -> names as stored, leaving out buffers that are no weights.

    A stored name that would stand for the same weight as another keeps its own name.
    """
    if architecture == OWN:
        return {name: name for name in stored}
    kind = ARCHITECTURES[architecture]
    plain: dict[str, str] = {}
    for name in stored:
        short = name.removeprefix(kind.prefix)
        if not kind.buffers.fullmatch(short):
            plain[name if short in plain else short] = name
    return plain
