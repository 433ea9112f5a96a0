"""Which block comes next: a shuffled order that is a pure function of seed, epoch and position.

Nothing is drawn while training, so the position alone resumes a run exactly.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.errors import UserError

Int64s = npt.NDArray[np.int64]


def shuffled(count: int, *entropy: int) -> Int64s:
    """A permutation of range(count) that depends on the entropy alone.

    Philox words are sorted instead of calling Generator.permutation: numpy promises the same words
    for ever, but not the same permutation (NEP 19).
    """
    words = random_words(count, *entropy)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def random_words(count: int, *entropy: int) -> npt.NDArray[np.uint64]:
    """Random 64-bit words that depend on the entropy alone."""
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


def counter(key: str, value: object) -> int:
    """A count of a saved position.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, int) or value < 0:
        raise UserError(
            f"the saved data position has {key}={value!r}, expected a count; "
            f"continue from another checkpoint"
        )
    return value


class SequenceSampler(ABC):
    """Numbers of sequences, a batch at a time, of which each rank takes its part.

    `batch_size` counts the sequences of all ranks together: rank r takes the r-th of `world` parts,
    as even as can be, so the batches do not depend on how many ranks share them.
    """

    def __init__(self, batch_size: int, rank: int, world: int) -> None:
        assert 0 <= rank < world <= batch_size
        self._batch_size = batch_size
        self._rank = rank
        self._world = world

    @property
    @abstractmethod
    def epoch(self) -> int:
        """How many times everything was gone through whole."""

    @property
    @abstractmethod
    def position(self) -> int:
        """How many sequences of this epoch all ranks together have taken."""

    @abstractmethod
    def take(self) -> Int64s:
        """The next numbers (batch_size,) of all ranks."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position and what it refers to, ready for JSON. It is the same on every rank."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last sequence of the sampler that gave this state.

        Batch size and world may differ from then.

        Raises:
            UserError: the state belongs to other data, another block size, seed or weights.
        """

    def next(self) -> Int64s:
        """This rank's next numbers."""
        return self.part(self.take())

    def part(self, batch: Int64s) -> Int64s:
        """Which of a whole batch's rows are this rank's."""
        begin, end = (len(batch) * rank // self._world for rank in (self._rank, self._rank + 1))
        return batch[begin:end]


class Order(SequenceSampler):
    """Numbers of sequences in an order that is shuffled anew in every epoch.

    A batch that reaches the end of an epoch goes on in the next one.
    """

    def __init__(self, batch_size: int, seed: int, rank: int, world: int) -> None:
        super().__init__(batch_size, rank, world)
        self._seed = seed
        self._epoch = 0
        self._position = 0  # sequences of this epoch that all ranks together have taken
        self._order = self._epoch_order(0)

    @abstractmethod
    def _epoch_order(self, epoch: int) -> Int64s:
        """All numbers of an epoch, shuffled."""

    @abstractmethod
    def _identity(self) -> dict[str, int]:
        """What a saved position refers to."""

    @property
    def epoch(self) -> int:
        """How many times everything was gone through whole."""
        return self._epoch

    @property
    def position(self) -> int:
        """How many sequences of this epoch all ranks together have taken."""
        return self._position

    def take(self) -> Int64s:
        """The next numbers (batch_size,) of all ranks."""
        taken = []
        wanted = self._batch_size
        while wanted:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order(self._epoch)
            part = self._order[self._position : self._position + wanted]
            self._position += len(part)
            wanted -= len(part)
            taken.append(part)
        return np.concatenate(taken)

    def state_dict(self) -> dict[str, Any]:
        """The position, the epoch and what they refer to."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last sequence of the sampler that gave this state."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise UserError(
                    f"the saved data position has {key}={state.get(key)!r}, this run has {value!r};"
                    f" continue with the options and the data it was saved with"
                )
        order = self._epoch_order(counter("epoch", state.get("epoch")))
        position = counter("position", state.get("position"))
        if position > len(order):
            raise UserError(
                f"the saved data position {position} is behind its epoch's {len(order)} blocks; "
                f"continue from another checkpoint"
            )
        self._epoch, self._position, self._order = int(state["epoch"]), position, order


class Sampler(Order):
    """Offsets of training blocks: an epoch cuts the tokens at a new place and shuffles the blocks.

    A block is `block_size` inputs and the one token after them. The blocks of an epoch lie side by
    side from a random start below `block_size`, so no input is seen twice in an epoch, and over the
    epochs every token is seen in every place.

    Raises:
        UserError: there are fewer than block_size + 1 tokens.
    """

    def __init__(
        self,
        n_tokens: int,
        block_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        *,
        split: str = "train",
    ) -> None:
        if n_tokens < block_size + 1:
            raise UserError(
                f"the {split} split has {n_tokens} tokens, a block needs block_size + 1 = "
                f"{block_size + 1}; give more text or a smaller --model.block-size"
            )
        self._n_tokens = n_tokens
        self._block_size = block_size
        super().__init__(batch_size, seed, rank, world)

    def _epoch_order(self, epoch: int) -> Int64s:
        """The offsets of all blocks of an epoch, shuffled."""
        starts = min(self._block_size, self._n_tokens - self._block_size)
        start = int(random_words(1, self._seed, epoch, 0)[0] % np.uint64(starts))
        blocks = (self._n_tokens - 1 - start) // self._block_size
        return shuffled(blocks, self._seed, epoch, 1) * self._block_size + start

    def _identity(self) -> dict[str, int]:
        return {"n_tokens": self._n_tokens, "block_size": self._block_size, "seed": self._seed}


class ItemSampler(Order):
    """The numbers 0 .. count - 1, each once in an epoch."""

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        assert count > 0
        self._count = count
        super().__init__(batch_size, seed, rank, world)

    def _epoch_order(self, epoch: int) -> Int64s:
        return shuffled(self._count, self._seed, epoch)

    def _identity(self) -> dict[str, int]:
        return {"count": self._count, "seed": self._seed}
