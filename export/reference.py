"""What the PyTorch model says, in float64 and as the file computes it: nothing is cached."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gptopt.export.stream import Claim
from gptopt.export.twin import (
    CACHE_BOUND,
    Held,
    Ranges,
    Rounding,
    exact_model,
    rounded_cache,
    same_model,
)

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

_KEPT_BYTES = 2**29
_TOGETHER = 256  # tokens that are computed at once
_SHORT = 16  # texts up to this length are computed together, whatever their lengths


class Expected(NamedTuple):
    """Logits at the positions of a claim, (n, V)."""

    double: Doubles
    single: Singles


class Text(NamedTuple):
    """Tokens, the position id of the first one, and from where on their logits are asked for."""

    tokens: tuple[int, ...]
    offset: int
    start: int


class Answers:
    """What a model said of texts, for several files that are held to it.

    Only what its own weights say is kept: those of quantised files are others.

    Args:
        limit_bytes: logits beyond this are computed again when they are asked for again.
    """

    def __init__(self, limit_bytes: int = _KEPT_BYTES) -> None:
        self._kept: dict[tuple[str, Text], npt.NDArray[Any]] = {}
        self._left = limit_bytes

    def find(self, kind: str, texts: Sequence[Text]) -> dict[Text, npt.NDArray[Any]]:
        """Logits of those texts that are known."""
        return {text: self._kept[kind, text] for text in texts if (kind, text) in self._kept}

    def keep(self, kind: str, found: dict[Text, npt.NDArray[Any]]) -> None:
        """Remember logits while there is room."""
        for text, logits in found.items():
            if logits.nbytes <= self._left and (kind, text) not in self._kept:
                self._kept[kind, text] = logits
                self._left -= logits.nbytes


class Reference:
    """The model in float64, and the same maths in the precision of a file.

    Args:
        model: in float32 and in evaluation mode; it is not changed.
        causal: whether the logits of a text's beginning are those of the beginning alone.
        held: the weights of the file, where they are not the model's own.
        answers: what the model has said before.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        causal: bool,
        held: Held | None = None,
        answers: Answers | None = None,
    ) -> None:
        self._model, self._causal = model, causal
        self._held = held or Held()
        self._answers = answers or Answers(0)
        self._latest: dict[Text, Doubles] = {}
        self._ranges: Ranges = {}  # of inputs of products, over the latest texts
        self._copies: dict[str, nn.Module] = {}
        self._cache_errors: dict[str, float] = {}

    def expect(self, claims: Sequence[Claim], *, rounds: bool = True) -> list[Expected]:
        """For each claim what it should say. No text is padded where that could be seen.

        Args:
            claims: what a graph said.
            rounds: whether the file rounds the inputs of products and the cache, if it does at all.
        """
        texts = self._texts(claims)
        wanted = list(dict.fromkeys(texts))
        if self._latest.keys() != set(wanted):  # a file and its strict twin play the same texts
            self._ranges = {}
            self._latest = self._ask("float64", wanted, rounds=False)
        doubles = self._latest
        singles = self._ask("float16" if self._held.half else "float32", wanted, rounds=rounds)
        found = []
        for claim, text in zip(claims, texts, strict=True):
            part = slice(claim.first - text.start, len(claim.tokens) - text.start)
            found.append(Expected(doubles[text][part], singles[text][part]))
        return found

    def coarsest(self) -> tuple[str, float, float] | None:
        """(part of an int8 cache, relative error, bound) of the part that lost most so far."""
        name = max(self._cache_errors, key=self._cache_errors.__getitem__, default=None)
        return None if name is None else (name, self._cache_errors[name], CACHE_BOUND)

    def _texts(self, claims: Sequence[Claim]) -> list[Text]:
        """For each claim the text that answers it: one that it is the beginning of, or its own."""
        tokens: list[tuple[int, ...]] = [()] * len(claims)
        found: dict[tuple[tuple[int, ...], int], int] = {}  # text -> start
        for index in sorted(range(len(claims)), key=lambda i: -len(claims[i].tokens)):
            claim = claims[index]
            length = len(claim.tokens) if self._causal else None
            tokens[index] = next(
                (
                    longer for longer, offset in found
                    if longer[:length] == claim.tokens and offset == claim.offset
                ),
                claim.tokens,
            )  # fmt: skip
            key = (tokens[index], claim.offset)
            found[key] = min(claim.first, found.get(key, claim.first))
        return [
            Text(said, claim.offset, found[said, claim.offset])
            for said, claim in zip(tokens, claims, strict=True)
        ]

    def _ask(self, kind: str, texts: Sequence[Text], *, rounds: bool) -> dict[Text, Any]:
        """Logits (len(tokens) - start, V) of each text."""
        held = self._held
        stored = held.products or held.tables or (held.halves and not held.half)
        own = not stored and not (held.cache and rounds)
        found = self._answers.find(kind, texts) if own else {}
        missing = [text for text in texts if text not in found]
        if missing:
            made: dict[Text, npt.NDArray[Any]] = {}
            model = self._copy(kind)
            with self._as_held(model, rounds):
                for batch in self._batches(missing):
                    made |= _logits(model, batch)
            dtype = np.float64 if kind == "float64" else np.float32
            made = {text: logits.astype(dtype, copy=False) for text, logits in made.items()}
            if own:
                self._answers.keep(kind, made)
            found |= made
        return found

    def _copy(self, kind: str) -> nn.Module:
        if kind not in self._copies:
            make: Callable[[nn.Module, Held], nn.Module] = (
                exact_model if kind == "float64" else same_model
            )
            self._copies[kind] = make(self._model, self._held)
        return self._copies[kind]

    @contextlib.contextmanager
    def _as_held(self, model: nn.Module, rounds: bool) -> Iterator[None]:
        """Run a copy of the model as the file is read, its inputs and cache rounded or not."""
        with contextlib.ExitStack() as stack:
            if self._held.products:
                rounding = Rounding(
                    self._model, model, self._held, inputs=rounds, ranges=self._ranges
                )
                stack.enter_context(rounding)
            if self._held.cache and rounds:
                stack.enter_context(rounded_cache(self._held.cache, self._cache_errors))
            yield

    def _batches(self, texts: Sequence[Text]) -> Iterator[list[Text]]:
        """Texts that are computed together.

        What follows a text does not change what a causal model says of it, so shorter texts may
        stand beside longer ones.
        """
        batch: list[Text] = []
        for text in sorted(texts, key=lambda each: (each.offset, -len(each.tokens))):
            longest, length = len(batch[0].tokens) if batch else 0, len(text.tokens)
            fits = length == longest or (
                self._causal and (longest <= _SHORT or 2 * length > longest)
            )
            if batch and (
                not fits or text.offset != batch[0].offset
                or (len(batch) + 1) * longest > _TOGETHER
            ):  # fmt: skip
                yield batch
                batch = []
            batch.append(text)
        yield batch


@torch.no_grad()  # in inference mode, Rounding would not see the products inside linear layers
def _logits(model: nn.Module, batch: Sequence[Text]) -> dict[Text, npt.NDArray[Any]]:
    """Logits of each text from its start on."""
    longest, offset = len(batch[0].tokens), batch[0].offset
    ids = [text.tokens + text.tokens[-1:] * (longest - len(text.tokens)) for text in batch]
    given: dict[str, Any] = {}
    if offset:
        positions = torch.arange(offset, offset + longest)[None]
        given["position_ids"] = positions.expand(len(batch), -1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = longest - min(text.start for text in batch)
    logits: torch.Tensor = model(torch.tensor(ids), **given).logits
    if logits.dim() == 2:  # of the whole text
        logits = logits[:, None]
    first = longest - logits.shape[1]
    return {
        text: logits[row, text.start - first : len(text.tokens) - first].numpy().copy()
        for row, text in enumerate(batch)
    }
