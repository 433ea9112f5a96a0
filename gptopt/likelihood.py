"""How likely a model finds one text behind another: multiple choice and harnesses stand on this.

One implementation for PyTorch models and exported folders; torch is imported for the former only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gptopt.config import SamplingOptions
from gptopt.config_classifier import says_next
from gptopt.errors import UserError
from gptopt.runtime.folder import end_ids, is_edge_folder
from gptopt.runtime.generation import Completion, Context
from gptopt.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
# ids (B, T), real tokens (B, T) bool, padded on the right -> logits (B, T, V) float32
Forward = Callable[[Ints, Bools], npt.NDArray[np.float32]]
Pair = tuple[list[int], list[int]]  # context, continuation: token ids

_LOGITS_AT_ONCE = 2**26  # float32: 256 MiB


@dataclass(frozen=True)
class Scored:
    """How likely a continuation is.

    Attributes:
        log_probability: of all its tokens, in nats.
        tokens: how many they are.
        greedy: whether each of them is the likeliest one.
    """

    log_probability: float
    tokens: int
    greedy: bool


class Completer(Protocol):
    """Continues a batch of prompts."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, *, context: Context
    ) -> Completion:
        """As gptopt.runtime.generation.complete."""


@dataclass(frozen=True)
class LikelihoodModel:
    """A model that scores continuations, and writes its own.

    Attributes:
        forward: the model.
        complete: continues prompts.
        tokenizer: what its ids mean.
        block_size, vocab_size: tokens it sees at once, width of its logits.
        where: device or provider it runs on, by that name.
    """

    forward: Forward
    complete: Completer
    tokenizer: Tokenizer
    block_size: int
    vocab_size: int
    where: dict[str, str]

    def pair(self, context: str, continuation: str) -> Pair:
        """Token ids of both, spelled as one text: spaces between them belong to what follows.

        Raises:
            UserError: the continuation is empty.
        """
        kept = context.rstrip()
        spelled = self.tokenizer.encode(kept)
        whole = self.tokenizer.encode(context + continuation)
        # Where a token spans both, the context gives it up.
        common = next(
            (at for at, (a, b) in enumerate(zip(spelled, whole, strict=False)) if a != b),
            min(len(spelled), len(whole)),
        )
        if common == len(whole):
            raise UserError("the continuation is empty; give at least one character")
        return whole[:common], whole[common:]

    def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        """How likely each continuation is behind its context.

        An empty context is the beginning-of-text token; one that is too long loses its oldest
        tokens.

        Raises:
            UserError: a continuation has no token, or more than the model sees at once.
        """
        rows = [self._row(context, continuation) for context, continuation in pairs]
        found: list[Scored | None] = [None] * len(rows)
        for batch in self._batches([len(ids) for ids, _ in rows]):
            for at, scored in zip(batch, self._score([rows[at] for at in batch]), strict=True):
                found[at] = scored
        return [scored for scored in found if scored is not None]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """All tokens, and how many at the end are scored."""
        if not 0 < len(continuation) <= self.block_size:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, expected 1 to {self.block_size}, "
                f"what the model sees at once; shorten it"
            )
        ids = [*(context or [self.tokenizer.bos_id]), *continuation]
        return ids[-(self.block_size + 1) :], len(continuation)

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices, the longest first, so that rows of a batch are of about one length."""
        order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
        while order:
            size = max(1, _LOGITS_AT_ONCE // (lengths[order[0]] * self.vocab_size))
            yield order[:size]
            order = order[size:]

    def _score(self, rows: list[tuple[list[int], int]]) -> Iterator[Scored]:
        T = max(len(ids) for ids, _ in rows) - 1
        inputs: Ints = np.full((len(rows), T), self.tokenizer.pad_id, dtype=np.int64)
        real: Bools = np.zeros((len(rows), T), dtype=np.bool_)
        for row, (ids, _) in enumerate(rows):
            inputs[row, : len(ids) - 1] = ids[:-1]
            real[row, : len(ids) - 1] = True
        logits = self.forward(inputs, real)  # (B, T, V)
        for row, (ids, count) in enumerate(rows):
            end = len(ids) - 1
            scores = logits[row, end - count : end].astype(np.float64)  # (count, V)
            targets = np.array(ids[-count:])
            top = scores.max(axis=-1, keepdims=True)
            norm = np.log(np.exp(scores - top).sum(axis=-1)) + top[:, 0]
            chosen = scores[np.arange(count), targets]
            greedy = bool((scores.argmax(axis=-1) == targets).all())
            yield Scored(float((chosen - norm).sum()), count, greedy)


def open_likelihood(
    model: str, *, checkpoint: str = "auto", device: str = "auto", precision: str = "auto"
) -> LikelihoodModel:
    """A model folder, run folder, Hugging Face folder or exported folder, ready to score.

    Args:
        model: as `gptopt evaluate` takes it.
        checkpoint: of a run: best, last, or a step number.
        device: of a PyTorch model; of an exported folder its provider.
        precision: of an exported folder: which file runs.

    Raises:
        UserError: no such model, one without a tokenizer, or a masked language model.
    """
    return (
        _open_edge(model, "cpu" if device == "auto" else device, precision)
        if is_edge_folder(Path(model))
        else _open_torch(model, checkpoint, device)
    )


def _open_edge(model: str, provider: str, precision: str) -> LikelihoodModel:
    from gptopt.runtime.edge import EdgeModel

    edge = EdgeModel(Path(model), provider=provider, precision=precision)
    _require(model, edge.config["causal"], edge.tokenizer)
    assert edge.tokenizer is not None

    def forward(ids: Ints, real: Bools) -> npt.NDArray[np.float32]:
        return edge.forward(ids, real)[0]

    where = {"provider": edge.provider, "precision": edge.precision}
    return LikelihoodModel(
        forward, edge.complete, edge.tokenizer, edge.block_size, edge.vocab_size, where
    )


def _open_torch(model: str, checkpoint: str, device: str) -> LikelihoodModel:
    import torch

    from gptopt.checkpoint import load_model
    from gptopt.generate import generate_tokens
    from gptopt.training.hardware import resolve_device

    place = resolve_device(device)
    loaded = load_model(model, checkpoint=checkpoint, device=place)
    config = loaded.model.config
    _require(model, says_next(config), loaded.tokenizer)
    assert loaded.tokenizer is not None
    assert config.vocab_size is not None
    ends = sorted({loaded.tokenizer.eos_id, *end_ids(loaded.folder)})

    def forward(ids: Ints, real: Bools) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            tensors = [torch.from_numpy(array).to(place) for array in (ids, real)]
            logits = loaded.model(tensors[0], attention_mask=tensors[1]).logits
        found: npt.NDArray[np.float32] = logits.float().cpu().numpy()
        return found

    def complete(
        prompts: Sequence[Sequence[int]], sampling: SamplingOptions, *, context: Context
    ) -> Completion:
        return generate_tokens(
            loaded.model, prompts, sampling,
            tokenizer=loaded.tokenizer, end_ids=ends, context=context,
        )  # fmt: skip

    where = {"device": str(place)}
    return LikelihoodModel(
        forward, complete, loaded.tokenizer, config.block_size, config.vocab_size, where
    )


def _require(model: str, causal: bool, tokenizer: Tokenizer | None) -> None:
    if not causal:
        raise UserError(
            f"{model}: is a masked language model or a classifier, which gives no probability to a "
            f"continuation; use a causal one"
        )
    if tokenizer is None:
        raise UserError(f"{model}: has no tokenizer, so it reads no text")
