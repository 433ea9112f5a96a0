"""What the PyTorch model says, in float64 and in float32: plain forward passes, nothing cached."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gptopt.export.stream import Claim

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]


class Expected(NamedTuple):
    """Logits at the positions of a claim, (n, V)."""

    double: Doubles
    single: Singles


@dataclass(slots=True)
class _Group:
    """Claims that one forward pass answers: their texts are beginnings of `tokens`."""

    tokens: tuple[int, ...]
    offset: int
    members: list[int] = field(default_factory=list)


class Reference:
    """The model as it is and in float64.

    Args:
        model: in float32 and in evaluation mode; it is not changed.
        causal: whether the logits of a text's beginning are those of the beginning alone.
    """

    def __init__(self, model: nn.Module, *, causal: bool) -> None:
        self._single = model
        self._double = copy.deepcopy(model).double()
        self._causal = causal

    def expect(self, claims: Sequence[Claim]) -> list[Expected]:
        """For each claim what it should say. Each text is computed alone and without padding."""
        found: dict[int, Expected] = {}
        for group in self._groups(claims):
            start = min(claims[index].first for index in group.members)
            single = _logits(self._single, group, start).astype(np.float32, copy=False)
            double = _logits(self._double, group, start).astype(np.float64, copy=False)
            for index in group.members:
                claim = claims[index]
                part = slice(claim.first - start, len(claim.tokens) - start)
                found[index] = Expected(double[part], single[part])
        return [found[index] for index in range(len(claims))]

    def _groups(self, claims: Sequence[Claim]) -> list[_Group]:
        groups: list[_Group] = []
        for index in sorted(range(len(claims)), key=lambda i: -len(claims[i].tokens)):
            claim = claims[index]
            length = len(claim.tokens) if self._causal else None
            for group in groups:
                if group.tokens[:length] == claim.tokens and group.offset == claim.offset:
                    group.members.append(index)
                    break
            else:
                groups.append(_Group(claim.tokens, claim.offset, [index]))
        return groups


@torch.no_grad()
def _logits(model: nn.Module, group: _Group, start: int) -> npt.NDArray[Any]:
    """Logits (len(tokens) - start, V) of a text, from position `start` on."""
    ids = torch.tensor([group.tokens])
    positions = None
    if group.offset:
        positions = torch.arange(group.offset, group.offset + ids.shape[1])[None]
    logits: torch.Tensor = model(ids, position_ids=positions).logits
    return np.asarray(logits[0, start:].numpy().copy())
