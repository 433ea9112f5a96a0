"""Several data folders as one, each heard as often as its weight says."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptopt.data.sampler import Int64s, Sampler, SequenceSampler, counter
from gptopt.data.shards import SPLITS, Dataset, TokenSplit
from gptopt.errors import UserError
from gptopt.tokenizer import Tokenizer


class Mixture:
    """Data folders of one tokenizer.

    Attributes:
        tokenizer: theirs.
        train, val: their splits, one behind the other.
        weights: share of the training sequences that come from each; they sum to 1.
        sha256: hex sha256 over the folders' own and the weights.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        weights: Sequence[float] | None = None,
        *,
        verify: bool = True,
    ) -> None:
        """Open the folders.

        Args:
            folders: data folders.
            weights: one for each; none: as their training tokens are.
            verify: compare the sha256 of every shard, not only its size.

        Raises:
            UserError: two of them have different tokenizers, or a weight does not fit.
            CheckFailed: a folder was changed.
        """
        self._parts = [Dataset(folder, verify=verify) for folder in folders]
        self.tokenizer: Tokenizer = self._parts[0].tokenizer
        for part in self._parts[1:]:
            if part.tokenizer.sha256 != self.tokenizer.sha256:
                raise UserError(
                    f"{part.folder}: was tokenised with another tokenizer (sha256 "
                    f"{part.tokenizer.sha256[:12]}) than {folders[0]} "
                    f"({self.tokenizer.sha256[:12]}); run gptopt tokenize --tokenizer {folders[0]}"
                )
        self.train, self.val = (
            TokenSplit.joined([part.split(name) for part in self._parts]) for name in SPLITS
        )
        sizes = [len(part.train) for part in self._parts]
        whole = sum(sizes) or 1
        self.weights = list(weights) if weights else [size / whole for size in sizes]
        identity = [[part.sha256 for part in self._parts], self.weights]
        self.sha256 = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def split(self, name: str) -> TokenSplit:
        """The split called train or val.

        Raises:
            UserError: there is no such split.
        """
        self._parts[0].split(name)  # says so
        return self.train if name == "train" else self.val

    def sampler(
        self, block_size: int, batch_size: int, seed: int, rank: int, world: int
    ) -> "MixtureSampler":
        """Offsets of blocks in `train`, none of them across two folders.

        Raises:
            UserError: a folder has fewer tokens than a block.
        """
        for part in self._parts:
            if len(part.train) < block_size + 1:
                raise UserError(
                    f"{part.folder}: {len(part.train)} training tokens are fewer than the "
                    f"{block_size + 1} of one block; leave it out, or give it more text"
                )
        samplers = [
            Sampler(len(part.train), block_size, 1, seed + number)
            for number, part in enumerate(self._parts)
        ]
        starts = np.cumsum([0, *(len(part.train) for part in self._parts)])[:-1]
        return MixtureSampler(samplers, starts.tolist(), self.weights, batch_size, rank, world)


class MixtureSampler(SequenceSampler):
    """Blocks of several sources; each has an order, and epochs, of its own.

    The next sequence is of the source that is furthest behind its weight, so after n sequences
    each has given its share of them to within one, however many sources there are.
    """

    def __init__(
        self,
        samplers: Sequence[Sampler],
        starts: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        rank: int,
        world: int,
    ) -> None:
        super().__init__(batch_size, rank, world)
        self._samplers, self._starts = list(samplers), list(starts)
        self._weights = np.asarray(weights, dtype=np.float64)
        self._taken: Int64s = np.zeros(len(self._samplers), dtype=np.int64)

    @property
    def epoch(self) -> int:
        """There is none of all sources together."""
        return 0

    @property
    def position(self) -> int:
        """How many sequences all ranks together have taken."""
        return int(self._taken.sum())

    def take(self) -> Int64s:
        """The next offsets (batch_size,) of all ranks."""
        return np.array([self._one() for _ in range(self._batch_size)], dtype=np.int64)

    def _one(self) -> int:
        behind = self._weights * (self.position + 1) - self._taken
        source = int(behind.argmax())
        self._taken[source] += 1
        return self._starts[source] + int(self._samplers[source].take()[0])

    def state_dict(self) -> dict[str, Any]:
        """The position in each source and what it refers to."""
        return {
            "weights": self._weights.tolist(),
            "taken": self._taken.tolist(),
            "sources": [sampler.state_dict() for sampler in self._samplers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last sequence of the sampler that gave this state."""
        taken, sources = state.get("taken", []), state.get("sources", [])
        fits = state.get("weights") == self._weights.tolist()
        if not (fits and len(taken) == len(sources) == len(self._samplers)):
            raise UserError(
                f"the saved data position has weights={state.get('weights')!r}, this run has "
                f"{self._weights.tolist()!r}; continue with the options and data it was saved with"
            )
        for sampler, saved in zip(self._samplers, sources, strict=True):
            sampler.load_state_dict(saved)
        self._taken = np.array([counter("taken", each) for each in taken], dtype=np.int64)


def parse_weights(text: str, inputs: Sequence[str]) -> list[float]:
    """The weights of `--mix`.

    Raises:
        UserError: not one positive number for each input, or they do not sum to 1.
    """
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--mix {text}: expected numbers, comma-separated, such as 0.7,0.3"
        ) from None
    if len(weights) != len(inputs):
        raise UserError(
            f"--mix {text}: {len(weights)} weights for {len(inputs)} inputs; give each its own"
        )
    if not all(0 < weight <= 1 for weight in weights):
        raise UserError(f"--mix {text}: expected weights above 0; leave out inputs of no weight")
    if abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"--mix {text}: the weights sum to {sum(weights):.6g}, expected 1")
    return weights
