"""Which part of a corpus validates: a tail of one file, whole documents of many."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gptopt.data.sampler import shuffled
from gptopt.data.sources import Piece


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
        order = np.arange(documents) if files == 1 else shuffled(documents, 0)
        validates[order[-count:]] = True
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
