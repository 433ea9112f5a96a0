"""One buffer for the whole cache, bound as past and as present: the graph writes it in place.

The binding is made once. A token then costs a few small arrays and one call; nothing is copied, and
no loop runs over the layers. A row that reads several tokens behind what it holds runs alone, on
its own part of the buffer: GroupQueryAttention refuses a batch there, and so each row also reads
exactly its own tokens, however ragged the batch.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gptopt.runtime import cache as limits
from gptopt.runtime.cache import Bools, Cache, Floats, Identify, Ints
from gptopt.runtime.generation import positions
from gptopt.runtime.session import KEEP, Session

# Tokens that are read at once. Longer parts take more memory and are slower, for their activations
# leave the processor's cache. Of GPT-2 in 4 bits, 512 tokens took one core 486 ms at once, 430 ms
# in parts of 256, and with an int8 cache, whose attention is not tiled, 852, 726 and (128) 622 ms.
_PART, _PART_INT8 = 256, 128
_COLUMNS = 128  # a step's mask grows by so many


class SharedCache(Cache):
    """Keys and values (2L, B, K, M, D) of all layers, M = capacity.

    Where the file takes padding on the right only, token t of a row lies at place t, whatever the
    other rows hold. Otherwise all rows share their columns, with padding where a row has no token.
    """

    def __init__(self, session: Session, rows: int, capacity: int, identify: Identify) -> None:
        super().__init__(session, rows, capacity, identify)
        K, D = session.cache_shape
        self.packed = session.file.padding == "right"
        self._buffer, self._address = session.zeros((len(session.past), rows, K, capacity, D))
        itemsize = np.dtype(session.cache_dtype).itemsize
        self._part = _PART_INT8 if session.file.cache_dtype == "int8" else _PART
        self._row_bytes = K * capacity * D * itemsize
        self._bindings: dict[tuple[int, int, bool], _Bound] = {}
        self._places = np.arange(capacity, dtype=np.int64)
        self._every = np.arange(rows)
        self._flat = np.zeros(rows * capacity, dtype=np.int64)  # the mask as it is fed
        self._fed = -1  # tokens that it says the one row has
        self._one_id = np.zeros((rows, 1), dtype=np.int64)
        self._one_position = np.zeros((rows, 1), dtype=np.int64)
        self._scores = np.zeros((rows, 1, session.vocab_size), session.logits_dtype)

    def step(self, ids: Ints, live: Bools) -> Floats:
        """See Cache.step. No array of the cache's size, or the scores', is made or copied."""
        self._hold_adapter()
        if self.packed and self.rows == 1 and live[0] and self._columns < self.capacity:
            S = self._place_alone(int(ids[0]))
        else:
            S = self._place(ids, live)
        bound = self._bound(0, self.rows, step=True)
        if bound.columns != S or self.session.device != "cpu":
            bound.columns = S
            bound.feed("input_ids", self._one_id)
            bound.feed("position_ids", self._one_position)
            bound.feed("attention_mask", self._flat[: self.rows * S].reshape(self.rows, S))
            bound.scores(self._scores)
        bound.run()
        self.session.count_step()
        return self._scores[:, 0].astype(np.float32, copy=False)

    def _place_alone(self, id_: int) -> int:
        """`_place` of the next token of one packed row.

        A token's weights push all else out of the processor's caches: what Python touches, it waits
        for, and a few array operations cost as much as a layer.
        """
        place = self._columns
        self._mask[0, place] = 1
        self._ids[0, place] = self._one_id[0, 0] = id_
        self._one_position[0, 0] = place
        self._columns = self._lengths[0] = place + 1
        if self._fed != place:
            return self._fill_mask(place)
        self._flat[place] = 1
        self._fed = place + 1
        return self._rounded(place + 1)

    def _place(self, ids: Ints, live: Bools) -> int:
        """Note a token of each row, and make ids, positions and mask of the step; its columns."""
        self._fed = -1
        if self.packed:
            S = self._place_right(ids, live)
        else:
            if self._columns >= self.capacity:
                self._check([[0]] * self.rows, self._columns + 1)
            S = self._columns + 1
            self._ids[:, S - 1] = ids
            self._mask[:, S - 1] = live
            self._flat[: self.rows * S].reshape(self.rows, S)[:] = self._mask[:, :S]
            self._columns = S
        self._one_id[:, 0] = ids
        np.minimum(self._lengths, self.capacity - 1, out=self._one_position[:, 0])
        self._lengths += live
        return S

    def _rounded(self, columns: int) -> int:
        """Columns of a packed mask: a few more, all masked, so that it is seldom bound anew."""
        return min(-(-columns // _COLUMNS) * _COLUMNS, self.capacity)

    def _fill_mask(self, last: Any) -> int:
        """Make a packed mask of the tokens up to place `last`, a number or (B, 1); its columns."""
        S = self._rounded(int(np.max(last)) + 1)
        fed = self._flat[: self.rows * S].reshape(self.rows, S)
        np.less_equal(self._places[:S], last, out=fed, casting="unsafe")
        self._flat[self.rows * S :] = 0
        self._fed = int(np.max(last)) + 1 if self.rows == 1 else -1
        return S

    def _place_right(self, ids: Ints, live: Bools) -> int:
        """Note the tokens at the end of each row, and fill the mask; its columns.

        The graph writes a row's new key and value at its first free place, also where the row takes
        no part: there it is overwritten later, or, in a full row, it costs the last token.
        """
        if self._columns >= self.capacity and (self._lengths[live] >= self.capacity).any():
            self._check([[0]] * self.rows, self._columns + 1)
        place = np.minimum(self._lengths, self.capacity - 1)
        self._lengths = np.where(live, self._lengths, place)
        self._mask[self._every, place] = live
        self._ids[self._every, place] = ids
        self._columns = max(int((place + live).max()), 0)
        return self._fill_mask(place[:, None])

    def read(self, texts: Sequence[Sequence[int]]) -> Floats:
        """See Cache.read."""
        lengths = np.array([len(text) for text in texts])
        longest = int(lengths.max(initial=0))
        end = (
            int((self._lengths + lengths).max(initial=0))
            if self.packed and len(lengths) == self.rows
            else self._columns + longest
        )
        self._check(texts, end)
        ragged = bool((lengths != longest).any())
        if self.rows == 1 or self._columns or self._apart(longest, ragged):
            return self._read_rows(texts, longest)
        return self._read_together(texts, longest, ragged)

    def _apart(self, longest: int, ragged: bool) -> bool:
        """Whether the rows of a first text had better be read one by one."""
        cells = self.rows * longest
        if cells > self._part:
            return True
        if ragged and self.packed:  # each row's last token lies elsewhere: all scores are needed
            return self.session.file.scores == "last" or self._too_many(cells)
        return not self._only_last and self._too_many(cells)

    @property
    def _only_last(self) -> bool:
        return self.session.keeps or self.session.file.scores == "last"

    def _too_many(self, tokens: int) -> bool:
        return tokens * self.session.vocab_size > limits.SCORES_AT_ONCE

    def _read_together(self, texts: Sequence[Sequence[int]], longest: int, ragged: bool) -> Floats:
        ids = np.zeros((self.rows, longest), dtype=np.int64)
        real = np.zeros((self.rows, longest), dtype=np.int64)
        for row, text in enumerate(texts):
            start = 0 if self.packed else longest - len(text)
            ids[row, start : start + len(text)] = text
            real[row, start : start + len(text)] = 1
        last = not (ragged and self.packed)
        order = positions(real.astype(np.bool_), longest)
        scores = self._feed(0, self.rows, ids, real, order, keep=int(last))
        self._ids[:, :longest], self._mask[:, :longest] = ids, real
        self._columns = longest
        self._lengths[:] = real.sum(axis=1)
        ends = self._lengths - 1 if self.packed and not last else -1
        behind: Floats = scores[self._every, ends]
        return behind

    def _read_rows(self, texts: Sequence[Sequence[int]], longest: int) -> Floats:
        scores = np.zeros((self.rows, self.session.vocab_size), np.float32)
        before = self._columns
        for row, text in enumerate(texts):
            end = before + longest
            if self.packed:
                end = int(self._lengths[row]) + len(text)
            self._ids[row, end - len(text) : end] = text
            self._mask[row, end - len(text) : end] = 1
            scores[row] = self._read_row(row, end - len(text), end)
            self._columns = max(self._columns, end)
            self._lengths[row] += len(text)
        return scores

    def _read_row(self, row: int, begin: int, end: int) -> Floats:
        """Let the graph read the row's tokens at places begin .. end; scores (V,) of the last."""
        step = self._part
        if not self._only_last:
            most = limits.SCORES_AT_ONCE // self.session.vocab_size
            step = min(step, max(limits.SHORTEST_PART, most))
        done = int(self._lengths[row])
        for start in range(begin, end, step):
            stop = min(start + step, end)
            order = np.arange(done, done + stop - start, dtype=np.int64)[None]
            ids, mask = self._ids[row : row + 1, start:stop], self._mask[row : row + 1, :stop]
            keep = 1 if stop == end else self.session.keep_none
            scores = self._feed(row, 1, ids, mask, order, keep)
            done += stop - start
        last: Floats = scores[0, -1]
        return last

    def _feed(self, row: int, rows: int, ids: Ints, mask: Ints, order: Ints, keep: int) -> Floats:
        """Run on some rows' part of the buffer: scores (rows, T, V) float32, or of fewer positions.

        `keep` is what the graph is told, where it can be told, see Session.
        """
        T = ids.shape[1]
        if self.session.file.scores == "last":
            T = 1
        elif keep and self.session.keeps:
            T = max(keep, 0)
        scores = np.empty((rows, T, self.session.vocab_size), self.session.logits_dtype)
        held = [np.ascontiguousarray(array, np.int64) for array in (ids, mask, order)]
        bound = self._bound(row, rows)
        for name, array in zip(_NAMES, held, strict=True):
            bound.feed(name, array)
        bound.keep(keep)
        bound.scores(scores)
        bound.run()
        return scores.astype(np.float32, copy=False)

    def _bound(self, row: int, rows: int, *, step: bool = False) -> "_Bound":
        """The binding of some rows; steps have one of their own, in which little changes."""
        bound = self._bindings.get((row, rows, step))
        if bound is None or bound.adapter is not self.session.adapter:
            K, D = self.session.cache_shape
            bound = _Bound(self.session, self._addresses(row), (rows, K, self.capacity, D))
            self._bindings[row, rows, step] = bound
        return bound

    def _addresses(self, row: int) -> list[int]:
        layer = self.rows * self._row_bytes
        parts = range(len(self.session.past))
        return [self._address + part * layer + row * self._row_bytes for part in parts]

    def _empty(self, rows: int) -> Self:
        return type(self)(self.session, rows, self.capacity, self.identify)

    def _parts(self, rows: list[int]) -> list[npt.NDArray[Any]]:
        array = self._buffer if isinstance(self._buffer, np.ndarray) else self._buffer.numpy()
        return [part[rows, :, : self._columns] for part in array]

    def _take(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        on_cpu = isinstance(self._buffer, np.ndarray)
        array = self._buffer if on_cpu else self._buffer.numpy()
        for part, value in zip(array, parts, strict=True):
            part[:, :, : self._columns] = value
        if not on_cpu:
            self._buffer.update_inplace(array)


_NAMES = ("input_ids", "attention_mask", "position_ids")


class _Bound:
    """A binding in which the cache stays and only small inputs change."""

    def __init__(self, session: Session, addresses: list[int], shape: tuple[int, ...]) -> None:
        self._session = session
        self.adapter = session.adapter
        self._binding = session.new_binding()
        self._fixed: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._kept = 0
        self.columns = 0  # of the mask that is bound
        dtype, device = session.cache_dtype, session.device
        for past, present, address in zip(session.past, session.present, addresses, strict=True):
            self._binding.bind_input(past, device, 0, dtype, shape, address)
            self._binding.bind_output(present, device, 0, dtype, shape, address)

    def feed(self, name: str, array: Ints) -> None:
        """Bind an array that outlives the run. Its values may change while it stays bound."""
        place = (array.ctypes.data, array.shape)
        # On the CPU the graph reads where the array lies; elsewhere binding it makes the copy.
        if self._session.device != "cpu" or self._fixed.get(name) != place:
            self._binding.bind_input(name, "cpu", 0, np.int64, array.shape, place[0])
            self._fixed[name] = place

    def keep(self, count: int) -> None:
        """Ask for the scores of the last positions only, where the graph offers it; see Session."""
        if self._session.keeps and count != self._kept:
            self._kept = count
            self._binding.bind_ortvalue_input(KEEP, self._session.kept(count))

    def scores(self, array: Floats) -> None:
        """Where the scores go."""
        place = (array.ctypes.data, array.shape)
        if self._fixed.get("logits") != place:
            self._binding.bind_output("logits", "cpu", 0, array.dtype, array.shape, place[0])
            self._fixed["logits"] = place

    def run(self) -> None:
        """Run what is bound."""
        self._session.execute(self._binding)
