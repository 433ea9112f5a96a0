"""What the PyTorch model says, in float64 and as the file computes it: nothing is cached."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gptopt.export.stream import Claim
from gptopt.export.twin import Held, Rounding, exact_model, rounded_cache, same_model

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
    """The model in float64, and the same maths in the precision of a file.

    Args:
        model: in float32 and in evaluation mode; it is not changed.
        causal: whether the logits of a text's beginning are those of the beginning alone.
        held: the weights of the file, where they are not the model's own.
        rounds: whether the file rounds the inputs of products.
    """

    def __init__(
        self, model: nn.Module, *, causal: bool, held: Held | None = None, rounds: bool = True
    ) -> None:
        held = held or Held()
        self._single = same_model(model, held)
        self._double = exact_model(model, held)
        self._held, self._rounds, self._model = held, rounds, model
        self._causal = causal

    def expect(self, claims: Sequence[Claim]) -> list[Expected]:
        """For each claim what it should say. Each text is computed alone and without padding."""
        found: dict[int, Expected] = {}
        for group in self._groups(claims):
            start = min(claims[index].first for index in group.members)
            with self._as_held(self._single, self._rounds):
                single = _logits(self._single, group, start).astype(np.float32, copy=False)
            with self._as_held(self._double, False):
                double = _logits(self._double, group, start).astype(np.float64, copy=False)
            for index in group.members:
                claim = claims[index]
                part = slice(claim.first - start, len(claim.tokens) - start)
                found[index] = Expected(double[part], single[part])
        return [found[index] for index in range(len(claims))]

    @contextlib.contextmanager
    def _as_held(self, model: nn.Module, rounds: bool) -> Iterator[None]:
        """Run a copy of the model as the file is read, its inputs and cache rounded or not."""
        with contextlib.ExitStack() as stack:
            if self._held.products:
                stack.enter_context(Rounding(self._model, model, self._held, inputs=rounds))
            if self._held.cache and rounds:
                stack.enter_context(rounded_cache(self._held.cache))
            yield

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
