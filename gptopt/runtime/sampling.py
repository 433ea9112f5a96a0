"""How the next token is chosen, in numpy. gptopt/sampling.py says the same in torch.

The filters, in this order, on the scores (logits) of one position:

1. ids beyond the tokenizer (the vocabulary's padding) can never be chosen;
2. repetition penalty p: the score of every token seen, in the prompt or since, is divided by p
   where positive and multiplied by p where negative (Keskar et al. 2019, arXiv:1909.05858, 4.1);
3. temperature 0 takes the likeliest token, the first of equals, and ends here; any other divides;
4. top-k keeps the K likeliest tokens, and those equal to the last of them (Fan et al. 2018,
   arXiv:1805.04833);
5. top-p keeps the likeliest tokens whose mass reaches P, the one that crosses it and its equals
   included (Holtzman et al. 2020, arXiv:1904.09751);
6. min-p drops tokens less likely than P times the likeliest one (Nguyen et al. 2024,
   arXiv:2407.01082).

A filter sees what the one before left, renormalised. One uniform number per token picks from the
cumulated mass, so both forms pick the same token from the same scores and the same seed.
"""

import numpy as np
import numpy.typing as npt

from gptopt.config import SamplingOptions
from gptopt.errors import CheckFailed

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def choose(
    logits: Floats, size: int, sampling: SamplingOptions, seen: Bools | None, draws: Floats
) -> Ints:
    """The next token of each row.

    Args:
        logits: (B, V) scores.
        size: ids of the tokenizer; those from `size` on are never chosen.
        sampling: the filters.
        seen: (B, size) which tokens the repetition penalty falls on; None where there is none.
        draws: (B,) uniform numbers in [0, 1); not used by temperature 0.

    Raises:
        CheckFailed: a row's scores are NaN or infinite.
    """
    scores = penalised(logits[:, :size], sampling, seen)
    best: Ints = scores.argmax(axis=-1).astype(np.int64)  # NaN counts as the largest
    if not np.isfinite(scores[np.arange(len(best)), best]).all():
        raise NotFinite
    if sampling.temperature == 0:
        return best
    mass = np.cumsum(probabilities(scores, sampling), axis=-1)  # (B, V)
    # A mark in (0, total]: the first token to reach it exists and has a mass of its own.
    picked: Ints = (mass < ((1 - draws) * mass[:, -1])[:, None]).sum(axis=-1)
    return picked


def penalised(logits: Floats, sampling: SamplingOptions, seen: Bools | None) -> Floats:
    """Scores (B, V) after the repetition penalty."""
    if seen is None or sampling.repetition_penalty == 1:
        return logits
    penalty = sampling.repetition_penalty
    return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(scores: Floats, sampling: SamplingOptions) -> Floats:
    """The filtered distribution (B, V) in float64. Temperature must not be 0."""
    scores = scores.astype(np.float64)
    scores = (scores - scores.max(axis=-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        kth = np.partition(scores, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scores = np.where(scores < kth, -np.inf, scores)
    p = np.exp(scores)
    p /= p.sum(axis=-1, keepdims=True)
    if sampling.top_p < 1:
        p = _nucleus(p, sampling.top_p)
    if sampling.min_p > 0:
        p = np.where(p < sampling.min_p * p.max(axis=-1, keepdims=True), 0, p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def _nucleus(p: Floats, top_p: float) -> Floats:
    ordered = -np.sort(-p, axis=-1)
    before = np.cumsum(ordered, axis=-1) - ordered  # mass of the likelier tokens
    last = (before < top_p).sum(axis=-1, keepdims=True) - 1
    return np.where(p < np.take_along_axis(ordered, last, axis=-1), 0, p)


class NotFinite(CheckFailed):
    """The model's scores are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite, so there is nothing to choose from; its weights "
            "are broken: use an earlier checkpoint"
        )
