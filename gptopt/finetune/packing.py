"""Examples of any length side by side in blocks of one length, none of them cut in two."""

import numpy as np
import numpy.typing as npt

from gptopt.data import IGNORED
from gptopt.finetune.examples import Examples

Ints = npt.NDArray[np.int64]
PADDING = -1  # the document of what is behind the last example of a block


def pack(lengths: Ints, room: int) -> list[list[int]]:
    """Which examples (indices) share a block of `room` places; every length must fit.

    Best fit, longest first: each example goes where it leaves the least room. Source: Johnson 1974,
    "Fast algorithms for bin packing", J. Comput. Syst. Sci. 8; at most 11/9 of the fewest blocks.
    """
    blocks: list[list[int]] = []
    open_blocks: dict[int, list[int]] = {}  # room left -> blocks
    rooms = 0  # bit r is set where a block has room r left
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        assert 0 < length <= room
        fitting = rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            block = open_blocks[left].pop()
            if not open_blocks[left]:
                rooms &= ~(1 << left)
        else:
            left, block = room, len(blocks)
            blocks.append([])
        blocks[block].append(index)
        left -= length
        open_blocks.setdefault(left, []).append(block)
        rooms |= 1 << left
    return blocks


class Packed:
    """Blocks of packed examples, as the keywords of a forward pass.

    An example of n tokens takes n - 1 places: each of its tokens but the last is read, each but the
    first is asked for where it was learned. `doc_ids` keep attention and positions to the example.

    Args:
        examples: where the tokens lie.
        chosen: which of them.
        block_size: T, places of a block.
        pad_id: read where no example is.
    """

    def __init__(self, examples: Examples, chosen: Ints, block_size: int, pad_id: int) -> None:
        self._examples, self._block_size, self._pad_id = examples, block_size, pad_id
        packed = pack(examples.lengths[chosen] - 1, block_size)
        self._blocks = [[int(chosen[place]) for place in block] for block in packed]
        self.counts = np.array([self._count(block) for block in self._blocks], dtype=np.int64)
        self.tokens = np.array(
            [sum(int(examples.lengths[i]) - 1 for i in block) for block in self._blocks],
            dtype=np.int64,
        )

    def __len__(self) -> int:
        return len(self._blocks)

    def _count(self, block: list[int]) -> int:
        learned = self._examples.learned
        return sum(int(learned[self._examples.span(index)][1:].sum()) for index in block)

    def batch(self, blocks: Ints) -> dict[str, Ints]:
        """ids, targets and doc_ids of some blocks, each (B, T)."""
        shape = (len(blocks), self._block_size)
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        documents = np.full(shape, PADDING, dtype=np.int64)
        for row, block in enumerate(blocks.tolist()):
            begin = 0
            for number, index in enumerate(self._blocks[block]):
                span = self._examples.span(index)
                tokens = self._examples.ids[span]
                place = slice(begin, begin + len(tokens) - 1)
                ids[row, place] = tokens[:-1]
                targets[row, place] = np.where(
                    self._examples.learned[span][1:], tokens[1:], IGNORED
                )
                documents[row, place] = number
                begin = place.stop
        return {"ids": ids, "targets": targets, "doc_ids": documents}
