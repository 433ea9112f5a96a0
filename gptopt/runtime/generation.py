"""The generation loop, one for PyTorch and the edge: batches, the cache, stops, the context edge.

A model takes part through the Decoder protocol. The loop itself is numpy and knows no framework, so
both say the same text wherever their scores agree.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from gptopt.config import SamplingOptions
from gptopt.errors import UserError
from gptopt.tokenizer import DecodeStream, Tokenizer

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Context = Literal["error", "slide"]
FinishReason = Literal["eos", "stop", "length", "context"]
OnText = Callable[[int, str], None]
OnToken = Callable[[int, int], None]


class Decoder(Protocol):
    """A model with a key/value cache, as the loop sees it."""

    block_size: int  # tokens the model can see at once
    vocab_size: int  # ids that it knows
    tokenizer_size: int  # ids that may be chosen: the rest of the vocabulary is padding

    def prefill(self, ids: Ints, mask: Bools) -> Any:
        """Forget the cache, read ids (B, T) left padded where mask (B, T) is False.

        Returns the scores of the last position, (B, V) in whatever form `choose` takes.
        """

    def decode(self, ids: Ints, mask: Bools) -> Any:
        """Read one more token of each row, ids (B, 1), into the cache; mask (B, S) covers it all.

        Where the mask's last column is False the row is finished and its scores do not matter.
        """

    def choose(
        self,
        scores: Any,
        sampling: SamplingOptions,
        seen: Bools | None,
        draws: npt.NDArray[np.float64],
    ) -> Ints:
        """The next token of each row, (B,), as gptopt.runtime.sampling.choose."""


@dataclass
class Generated:
    """What became of one prompt.

    Attributes:
        prompt_tokens: tokens of the prompt, a start token included.
        tokens: every token the model chose, the one that ended the text included.
        text: what they say, without control tokens and cut before a stop text.
        finish_reason: eos (end-of-text token), stop (a stop text), length (max_new_tokens) or
            context (the context was full).
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A batch of generated texts and the time it took."""

    rows: list[Generated]
    first_token_ms: float  # from the call until the first token of all rows
    total_ms: float

    @property
    def new_tokens(self) -> int:
        """Tokens generated in all rows."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token, all rows together; None where there was no second one."""
        later = self.new_tokens - len(self.rows)
        seconds = (self.total_ms - self.first_token_ms) / 1e3
        return later / seconds if later and seconds > 0 else None


class TextStream:
    """Turns tokens into text that is safe to show: whole characters, never a part of a stop text.

    What might be the start of a stop text is held back until it is known not to be one.
    """

    def __init__(self, stream: DecodeStream, stops: Sequence[str]) -> None:
        self._stream = stream
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain; sets `stopped` when a stop text is complete."""
        return self._release(self._stream.push(token))

    def flush(self) -> str:
        """The rest, at the end of a generation."""
        text = self._release(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        cut = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Row:
    """One prompt on its way: what the model sees of it, and what it has said."""

    def __init__(
        self, index: int, prompt: list[int], sampling: SamplingOptions, stream: TextStream | None
    ) -> None:
        self.index = index
        self.window = prompt  # the tokens in the model's context
        self.slid = False  # the window was cut, so that the cache no longer fits it
        self.result = Generated(prompt_tokens=len(prompt))
        self.stream = stream
        # A row's draws depend on the seed and its place in the batch, not on the other rows.
        self.random = np.random.default_rng([sampling.seed, index])

    @property
    def done(self) -> bool:
        return self.result.finish_reason is not None


class _Loop:
    def __init__(
        self,
        decoder: Decoder,
        sampling: SamplingOptions,
        context: Context,
        end_ids: Sequence[int],
        on_text: OnText | None,
        on_token: OnToken | None,
    ) -> None:
        self.decoder = decoder
        self.sampling = sampling
        self.context = context
        self.end_ids = frozenset(end_ids)
        self.on_text = on_text
        self.on_token = on_token

    def run(self, rows: list[_Row]) -> Completion:
        started = time.perf_counter()
        first_ms: float | None = None
        seen = self._seen(rows)
        for row in rows:
            row.window = fit(row.window, self.decoder.block_size)
        scores, mask = self._prefill(rows)
        while True:
            draws = np.array([row.random.random() for row in rows])
            chosen = self.decoder.choose(scores, self.sampling, seen, draws)
            first_ms = _ms_since(started) if first_ms is None else first_ms
            for row in rows:
                if not row.done:
                    self._take(row, int(chosen[row.index]))
                    if seen is not None:
                        seen[row.index, row.result.tokens[-1]] = True
            if all(row.done for row in rows):
                return Completion([row.result for row in rows], first_ms, _ms_since(started))
            scores, mask = self._advance(rows, mask)

    def _seen(self, rows: list[_Row]) -> Bools | None:
        if self.sampling.repetition_penalty == 1:
            return None
        seen = np.zeros((len(rows), self.decoder.tokenizer_size), dtype=np.bool_)
        for row in rows:
            seen[row.index, [id_ for id_ in row.window if id_ < seen.shape[1]]] = True
        return seen

    def _take(self, row: _Row, token: int) -> None:
        """Note a chosen token, and find out whether the row goes on."""
        result = row.result
        result.tokens.append(token)
        if self.on_token is not None:
            self.on_token(row.index, token)
        if token not in self.end_ids and row.stream is not None:
            self._say(row, row.stream.push(token))
        result.finish_reason = self._reason_to_end(row, token)
        if result.finish_reason is None:
            row.window.append(token)
            cut = fit(row.window, self.decoder.block_size)
            row.slid = len(cut) < len(row.window)
            row.window = cut
            return
        row.window = row.window[-1:]  # a finished row only keeps its place in the batch
        if row.stream is not None:
            self._say(row, row.stream.flush())

    def _reason_to_end(self, row: _Row, token: int) -> FinishReason | None:
        if token in self.end_ids:
            return "eos"
        if row.stream is not None and row.stream.stopped:
            return "stop"
        if len(row.result.tokens) >= self.sampling.max_new_tokens:
            return "length"
        if self.context == "error" and len(row.window) >= self.decoder.block_size:
            return "context"
        return None

    def _say(self, row: _Row, text: str) -> None:
        row.result.text += text
        if text and self.on_text is not None:
            self.on_text(row.index, text)

    def _advance(self, rows: list[_Row], mask: Bools) -> tuple[Any, Bools]:
        """Let the model read the chosen tokens: scores, and the mask of what the cache holds."""
        if any(row.slid for row in rows) or mask.shape[1] >= self.decoder.block_size:
            return self._prefill(rows)
        ids = np.array([[row.window[-1]] for row in rows], dtype=np.int64)
        mask = np.concatenate([mask, [[not row.done] for row in rows]], axis=1)
        return self.decoder.decode(ids, mask), mask

    def _prefill(self, rows: list[_Row]) -> tuple[Any, Bools]:
        ids, mask = left_padded([row.window for row in rows])
        for row in rows:
            row.slid = False
        return self.decoder.prefill(ids, mask), mask


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3


def fit(window: list[int], block_size: int) -> list[int]:
    """What a sliding context keeps: all that fits, else the last half of the context's length.

    Dropping to half, not by one, leaves room to go on with the cache: the tokens that stay get new
    positions, so that every cut costs a prefill.
    """
    return window if len(window) <= block_size else window[-max(1, block_size // 2) :]


def left_padded(windows: Sequence[Sequence[int]]) -> tuple[Ints, Bools]:
    """ids and mask (B, T) with the rows' ends aligned; padding is id 0 under a False mask."""
    longest = max(len(window) for window in windows)
    ids = np.zeros((len(windows), longest), dtype=np.int64)
    mask = np.zeros((len(windows), longest), dtype=np.bool_)
    for row, window in enumerate(windows):
        ids[row, longest - len(window) :] = window
        mask[row, longest - len(window) :] = True
    return ids, mask


def positions(mask: Bools, last: int) -> Ints:
    """Position ids (B, last) of the last columns of a mask (B, S): real tokens count from 0."""
    counted = np.cumsum(mask, axis=1, dtype=np.int64) - 1
    return np.maximum(counted[:, mask.shape[1] - last :], 0)


def complete(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    *,
    tokenizer: Tokenizer | None = None,
    end_ids: Sequence[int] = (),
    context: Context = "error",
    on_text: OnText | None = None,
    on_token: OnToken | None = None,
) -> Completion:
    """Continue a batch of prompts.

    Args:
        decoder: the model.
        prompts: token ids; an empty prompt must have been given a start token.
        sampling: filters, seed, stop texts and the number of new tokens.
        tokenizer: turns tokens into text; without one `text` stays empty and stop texts are an
            error.
        end_ids: tokens that end a text.
        context: at a full context stop with the reason "context", or slide: a context that would
            exceed block_size tokens, in the prompt or later, is cut to its last block_size // 2.
        on_text: called with the row and each piece of text as soon as it is certain.
        on_token: called with the row and each chosen token.

    Raises:
        UserError: a prompt is longer than the context (unless it slides), is empty or holds ids
            that the model does not know, or a stop text is empty.
    """
    if any(not stop for stop in sampling.stop):
        raise UserError("--stop: an empty text would end every generation at once; remove it")
    if sampling.stop and tokenizer is None:
        raise UserError("--stop needs a tokenizer, and this model has none")
    rows = []
    for index, prompt in enumerate(prompts):
        ids = [int(id_) for id_ in prompt]
        _check_prompt(index, ids, decoder, context)
        stream = tokenizer and TextStream(tokenizer.decode_stream(), sampling.stop)
        rows.append(_Row(index, ids, sampling, stream or None))
    if not rows:
        raise UserError("there is no prompt to continue; give one with --prompt")
    return _Loop(decoder, sampling, context, end_ids, on_text, on_token).run(rows)


def _check_prompt(index: int, ids: list[int], decoder: Decoder, context: Context) -> None:
    if not ids:
        raise UserError(f"prompt {index + 1} is empty, and there is no start token to begin with")
    if wrong := [id_ for id_ in ids if not 0 <= id_ < decoder.vocab_size]:
        raise UserError(
            f"prompt {index + 1}: token {wrong[0]} is not among the model's {decoder.vocab_size} "
            f"ids; use the model's own tokenizer"
        )
    if len(ids) > decoder.block_size and context == "error":
        raise UserError(
            f"prompt {index + 1} has {len(ids)} tokens, the model sees {decoder.block_size}; "
            f"shorten it, or let the oldest tokens go with --context slide"
        )


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a prompt; an empty one starts from the beginning-of-text token."""
    return tokenizer.encode(text) or [tokenizer.bos_id]
