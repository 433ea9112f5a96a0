"""Which part of a corpus validates: a tail of one file, whole documents of many."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gptopt.data.sources import Piece

_WORDS_AT_ONCE = 2**18
_LOW_BITS = np.uint64(48)


@dataclass(frozen=True)
class Plan:
    """The documents that validate and, where there is but one, the character it is cut at."""

    validates: npt.NDArray[np.bool_]  # (documents,)
    cut: int | None = None  # characters of the only document that train

    @classmethod
    def make(cls, *, files: int, documents: int, characters: int, fraction: float) -> "Plan":
        """Hold out `fraction` (0: nothing).

        - One document: the last `fraction` of its characters, rounded up.
        - One file of several documents: its last ones. Many files: documents drawn by a fixed
          shuffle of their numbers. Either way `fraction` of the documents, rounded, at least one
          and never all; no document is split.
        """
        validates = np.zeros(documents, dtype=np.bool_)
        if fraction == 0:
            return cls(validates)
        if documents == 1:
            return cls(validates, cut=int(characters * (1 - fraction)))
        count = min(max(1, round(fraction * documents)), documents - 1)
        if files == 1:
            validates[-count:] = True
        else:
            _mark_last_of_shuffle(validates, count)
        return cls(validates)

    def assign(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, Piece]]:
        """Each piece with the name of its split; a piece across the cut becomes two."""
        for piece in pieces:
            if self.cut is None:
                yield ("val" if self.validates[piece.document] else "train"), piece
                continue
            here = min(max(self.cut - piece.offset, 0), len(piece.text))
            if here:
                yield "train", replace(piece, text=piece.text[:here])
            if here < len(piece.text):
                tail = replace(piece, text=piece.text[here:], offset=piece.offset + here)
                yield "val", tail


def _mark_last_of_shuffle(marks: npt.NDArray[np.bool_], count: int) -> None:
    """Mark what `shuffled(len(marks), 0)[-count:]` holds, in memory that does not grow with it.

    Those are the places of the largest of the words that `shuffled` sorts: how large a word must be
    is found by counting their first bits, then by sorting the few that share the decisive ones.
    """
    tops = np.zeros(2**16, dtype=np.int64)
    for _, words in _words(len(marks)):
        tops += np.bincount((words >> _LOW_BITS).astype(np.int64), minlength=len(tops))
    above = tops[::-1].cumsum()[::-1]  # words whose first bits are these or larger
    top = int(np.flatnonzero(above >= count)[-1])
    among = np.sort(np.concatenate([w[w >> _LOW_BITS == top] for _, w in _words(len(marks))]))
    least = among[int(above[top]) - count]
    for begin, words in _words(len(marks)):
        marks[begin : begin + len(words)] = words >= least


def _words(count: int) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """The words of `random_words(count, 0)`, some at a time, each time with where they begin."""
    source = np.random.Philox(np.random.SeedSequence((0,)))
    for begin in range(0, count, _WORDS_AT_ONCE):
        yield begin, source.random_raw(min(_WORDS_AT_ONCE, count - begin))
