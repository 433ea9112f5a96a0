"""How the next token is chosen, in torch: gptopt/runtime/sampling.py on the model's own device.

The order and the meaning of the filters are written down there; a test holds the two together.
"""

import torch
from torch import Tensor

from gptopt.config import SamplingOptions
from gptopt.runtime.sampling import NotFinite


def choose(
    logits: Tensor, size: int, sampling: SamplingOptions, seen: Tensor | None, draws: Tensor
) -> Tensor:
    """The next token of each row, (B,) int64, from logits (B, V) of any float dtype.

    Args and Raises: as gptopt.runtime.sampling.choose; `draws` is float64 on any device.
    """
    scores = penalised(logits[:, :size].float(), sampling, seen)
    if not bool(scores.amax(dim=-1).isfinite().all()):
        raise NotFinite
    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    mass = probabilities(scores, sampling).cumsum(dim=-1)  # (B, V)
    return (mass < (1 - draws).to(mass)[:, None] * mass[:, -1:]).sum(dim=-1)


def penalised(scores: Tensor, sampling: SamplingOptions, seen: Tensor | None) -> Tensor:
    """Scores (B, V) after the repetition penalty."""
    if seen is None or sampling.repetition_penalty == 1:
        return scores
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def probabilities(scores: Tensor, sampling: SamplingOptions) -> Tensor:
    """The filtered distribution (B, V), in float64 where the device has it."""
    # Metal has no float64; its distributions are float32's.
    scores = scores.to(torch.float32 if scores.device.type == "mps" else torch.float64)
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        kth = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    p = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        p = _nucleus(p, sampling.top_p)
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.amax(dim=-1, keepdim=True), 0)
    return p / p.sum(dim=-1, keepdim=True)


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    ordered = p.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier tokens
    last = (before < top_p).sum(dim=-1, keepdim=True) - 1
    return p.masked_fill(p < ordered.gather(-1, last), 0)
