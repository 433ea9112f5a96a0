"""What a model has read: token ids, which of them are padding, and keys and values by layer.

A cache belongs to one opened model. It reads ragged texts, takes one more token of every row, can
be rewound, branched (rows copied into a new cache) and saved. `GrowingCache` is the form in which
the graph makes a new, longer cache every time; gptopt.runtime.shared has the one written in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gptopt.errors import UserError
from gptopt.runtime.generation import left_padded, positions
from gptopt.runtime.session import Session

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Identify = Callable[[], str]
Bools = npt.NDArray[np.bool_]

SCORES_AT_ONCE = 2**24  # float32 logits of one part of a prompt: 64 MiB
SHORTEST_PART = 16  # tokens; shorter ones would read the weights too often


class Cache(ABC):
    """Rows of text that a model has read.

    Args:
        session: what runs the graph.
        rows: B.
        capacity: columns (tokens and padding) that a row can hold, the model's block_size.
        identify: gives the sha256 of the ONNX file and its data, which a saved cache carries.

    Attributes:
        packed: the tokens of a row lie side by side whatever the other rows hold; otherwise rows
            share their columns, with padding where a row has no token.
    """

    def __init__(self, session: Session, rows: int, capacity: int, identify: Identify) -> None:
        self.rows = rows
        self.capacity = capacity
        self.session = session
        self.identify = identify
        self.packed = False
        self._ids = np.zeros((rows, capacity), dtype=np.int64)
        self._mask = np.zeros((rows, capacity), dtype=np.int64)  # 1 where a real token lies
        self._columns = 0  # in use
        self._lengths = np.zeros(rows, dtype=np.int64)  # real tokens of each row
        self._adapter = session.adapter  # that was on when they were read

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has read."""
        return [int(length) for length in self._lengths]

    @property
    def columns(self) -> int:
        """Tokens and padding of the longest row."""
        return self._columns

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens that each row has read."""
        real = self._mask[:, : self._columns].astype(np.bool_)
        ids = self._ids[:, : self._columns]
        return [ids[row, real[row]].tolist() for row in range(self.rows)]

    @abstractmethod
    def read(self, texts: Sequence[Sequence[int]]) -> Floats:
        """Read one or more tokens of each row; scores (B, V) behind the last of each.

        Raises:
            UserError: a text is empty, or the rows become longer than the model's context.
        """

    @abstractmethod
    def step(self, ids: Ints, live: Bools) -> Floats:
        """Read one token of each row, ids (B,); scores (B, V), valid until the next call.

        Where `live` (B,) is False the row takes no part: it stays as it is (a full one loses its
        last token) and its scores say nothing.
        """

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Forget all but the first tokens of each row: one number, or one for each row.

        Raises:
            UserError: a row is shorter than that.
        """
        wanted = np.broadcast_to(np.asarray(lengths, dtype=np.int64), (self.rows,))
        if (wanted < 0).any() or (wanted > self._lengths).any():
            raise UserError(
                f"the cache cannot be rewound to {wanted.tolist()} tokens, its rows hold "
                f"{self.lengths}"
            )
        mask = self._mask[:, : self._columns]
        mask *= np.cumsum(mask, axis=1) <= wanted[:, None]
        used = np.flatnonzero(mask.any(axis=0))
        self._columns = int(used[-1]) + 1 if len(used) else 0
        self._lengths[:] = wanted

    def branch(self, rows: Sequence[int] | None = None) -> Self:
        """An independent copy, of the given rows in their order, which may repeat; none: of all.

        Beams, several answers to one prompt, and a state to come back to are branches.

        Raises:
            UserError: there is no such row.
        """
        chosen = list(range(self.rows)) if rows is None else [int(row) for row in rows]
        if not chosen or not all(0 <= row < self.rows for row in chosen):
            raise UserError(f"the cache has rows 0 to {self.rows - 1}; rows {chosen} were asked")
        copy = self._empty(len(chosen))
        S = self._columns
        copy.fill(self._ids[chosen, :S], self._mask[chosen, :S], self._parts(chosen))
        copy._adapter = self._adapter
        return copy

    def save(self, path: Path | str) -> None:
        """Write the cache to a safetensors file; EdgeModel.load_cache reads it again."""
        from gptopt.runtime.cache_file import write

        self._hold_adapter()
        everything = list(range(self.rows))
        S = self._columns
        parts = dict(zip(self.session.past, self._parts(everything), strict=True))
        write(Path(path), self.identify(), self._ids[:, :S], self._mask[:, :S], parts)

    def fill(self, ids: Ints, mask: Ints, parts: Sequence[Any]) -> None:
        """Take over ids and mask (B, S) and, key and value by layer, arrays (B, K, S, D)."""
        self._columns = S = ids.shape[1]
        self._ids[:, :S], self._mask[:, :S] = ids, mask
        self._mask[:, S:] = 0
        self._lengths[:] = self._mask.sum(axis=1)
        self._take(parts)

    @abstractmethod
    def _empty(self, rows: int) -> Self:
        """A cache like this one that has read nothing."""

    @abstractmethod
    def _parts(self, rows: list[int]) -> list[npt.NDArray[Any]]:
        """Key and value by layer of some rows, (len(rows), K, S, D) each."""

    @abstractmethod
    def _take(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        """The reverse of `_parts`, for all rows."""

    def _hold_adapter(self) -> None:
        """Keys and values of one adapter mean nothing to another one, or to the base."""
        if not self._columns:
            self._adapter = self.session.adapter
        elif self._adapter is not self.session.adapter:
            raise UserError(
                "the cache was read with another adapter than the one that is on; switch back, or "
                "rewind it to 0 and read the text again"
            )

    def _check(self, texts: Sequence[Sequence[int]], columns: int) -> None:
        self._hold_adapter()
        if len(texts) != self.rows or not all(len(text) for text in texts):
            raise UserError(
                f"a cache of {self.rows} rows reads a text of one or more tokens for each, found "
                f"texts of {[len(text) for text in texts]} tokens"
            )
        if columns > self.capacity:
            raise UserError(
                f"the cache holds {self.capacity} columns, {columns} are needed; rewind it, or "
                f"read into a new one"
            )


class GrowingCache(Cache):
    """The graph returns a new cache, longer by what it read, as onnxruntime values."""

    def __init__(self, session: Session, rows: int, capacity: int, identify: Identify) -> None:
        super().__init__(session, rows, capacity, identify)
        self._past: list[Any] = []

    def read(self, texts: Sequence[Sequence[int]]) -> Floats:
        """See Cache.read."""
        ids, real = left_padded(texts)
        T = ids.shape[1]
        self._check(texts, self._columns + T)
        # The graph may score every position; read in parts, those scores stay small: of 16 prompts
        # of 1024 tokens GPT-2's would take 3 GiB.
        step = max(SHORTEST_PART, SCORES_AT_ONCE // (self.rows * self.session.vocab_size))
        step = T if self.session.keeps else step
        for begin in range(0, T, step):
            scores = self._run(ids[:, begin : begin + step], real[:, begin : begin + step])
        return scores

    def step(self, ids: Ints, live: Bools) -> Floats:
        """See Cache.step."""
        self._hold_adapter()
        if self._columns >= self.capacity:
            self._check([[0]] * self.rows, self._columns + 1)
        return self._run(ids[:, None], live[:, None])

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """See Cache.rewind."""
        before = self._columns
        super().rewind(lengths)
        if self._columns < before:
            self._past = self._parts(list(range(self.rows))) if self._columns else []

    def _run(self, ids: Ints, real: Bools) -> Floats:
        begin, self._columns = self._columns, self._columns + ids.shape[1]
        self._ids[:, begin : self._columns] = ids
        self._mask[:, begin : self._columns] = real
        mask = self._mask[:, : self._columns].astype(np.bool_)
        order = positions(mask, ids.shape[1])
        logits, self._past = self.session.run(ids, mask, order, self._past, keep=1)
        self._lengths += real.sum(axis=1)
        return logits[:, -1]

    def _empty(self, rows: int) -> Self:
        return type(self)(self.session, rows, self.capacity, self.identify)

    def _parts(self, rows: list[int]) -> list[npt.NDArray[Any]]:
        K, D = self.session.cache_shape
        if not self._past:
            empty = np.zeros((len(rows), K, 0, D), self.session.cache_dtype)
            return [empty] * len(self.session.past)
        arrays = (p if isinstance(p, np.ndarray) else p.numpy() for p in self._past)
        return [array[rows, :, : self._columns] for array in arrays]

    def _take(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        self._past = list(parts) if self._columns else []
