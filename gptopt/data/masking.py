"""Which tokens a masked language model has to guess, and what it sees in their place."""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gptopt.data.sampler import random_words
from gptopt.tokenizer import Tokenizer

IGNORED = -100  # a target that does not count
RATE = 0.15
_MASKED, _REPLACED = 8, 1  # of ten chosen tokens; the rest stays as it is

Ids = npt.NDArray[np.int64]


class Masking(NamedTuple):
    """The rule of a tokenizer and a run.

    A token is chosen with probability `rate`. Of ten chosen ones eight become the mask token, one
    becomes any token and one stays; control tokens are never chosen. Source: Devlin et al. 2019
    (BERT), arXiv:1810.04805, section 3.1.
    """

    mask_id: int
    size: int  # ids that a token can be replaced by: those below
    control_ids: tuple[int, ...]
    rate: float = RATE

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float = RATE) -> Self:
        """The rule for a tokenizer that has a mask token."""
        assert tokenizer.mask_id is not None
        return cls(tokenizer.mask_id, tokenizer.size, tokenizer.control_ids, rate)

    def apply(self, ids: Ids, *entropy: int) -> tuple[Ids, Ids]:
        """(inputs, targets), both as ids (B, T); nothing but the entropy decides what is chosen."""
        flat = ids.reshape(-1)
        chance = random_words(flat.size, *entropy, 0) >> np.uint64(11)  # 53 bits
        chosen = chance < np.uint64(int(self.rate * 2**53))
        chosen &= ~np.isin(flat, self.control_ids)
        places = np.flatnonzero(chosen)
        fate, other = random_words(2 * len(places), *entropy, 1).reshape(2, -1)
        fate = fate % np.uint64(10)
        inputs, targets = flat.copy(), np.full_like(flat, IGNORED)
        targets[places] = flat[places]
        inputs[places[fate < _MASKED]] = self.mask_id
        replaced = fate >= 10 - _REPLACED
        inputs[places[replaced]] = (other[replaced] % np.uint64(self.size)).astype(np.int64)
        return inputs.reshape(ids.shape), targets.reshape(ids.shape)
