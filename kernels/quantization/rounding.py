"""Scales, zero points and codes of single blocks: to nearest, and by search.

Everything here works on blocks (M, block) at once, each with its own scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Blocks are taken in pieces of about this many elements, which fit into a core's own cache.
_PIECE = 2**18

# Ranges that the search tries, as parts of the range that clips nothing. Dense codes gain little
# from clipping, sparse ones much (an optimal 2-bit range clips a third of a normal distribution).
_RANGES = {
    2: (0.35, 0.43, 0.5, 0.57, 0.64, 0.72, 0.8, 0.9, 1.0),
    4: (0.72, 0.77, 0.82, 0.87, 0.91, 0.95, 0.98, 1.01, 1.05, 1.1),
    8: (0.98, 0.99, 0.996, 1.0, 1.004),
}
_REFINEMENTS = 3
_TINY = 1e-30  # the inverse of a much smaller scale is not finite


class Rounded(NamedTuple):
    """Codes (M, block), scales (M, 1) and zero points (M, 1), all float32 whole numbers but one."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """What the codes stand for, (M, block)."""
        return (self.codes - self.zeros) * self.scales


def nearest(x: Tensor, *, bits: int, symmetric: bool) -> Rounded:
    """Round blocks (M, block) to nearest, in a range that clips nothing.

    Symmetric codes reach one step further down than up; the scale's sign makes the element of
    largest magnitude the one that uses that step.
    """
    scales, zeros = _full_range(x, bits, symmetric)
    return Rounded(encode(x, scales, zeros, bits), scales, zeros)


def search(x: Tensor, importance: Tensor | None = None, *, bits: int, symmetric: bool) -> Rounded:
    """Find the scale (and zero point) of least weighted squared error, per block (M, block).

    For given codes the best scale is known, sum(w x c) / sum(w c^2). So a few ranges (and zero
    points) are tried, each with the best scale of its codes, and the best is refined by rounding
    anew with its scale.

    Args:
        x: (M, block) float32.
        importance: weight of each element's squared error, of a shape that broadcasts to x, >= 0.
        bits: 2, 4 or 8.
        symmetric: the zero point is 2^(bits - 1).

    Source: the alternation of codes and scale is Lloyd's (IEEE Trans. Inf. Theory 28, 1982).
    """
    step = max(1, _PIECE // x.shape[1])
    pieces = [
        _search(part, _part(importance, start, part), bits, symmetric)
        for start in range(0, x.shape[0], step)
        for part in [x[start : start + step]]
    ]
    return Rounded(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _part(importance: Tensor | None, start: int, piece: Tensor) -> Tensor | None:
    if importance is None or importance.ndim < 2 or importance.shape[0] == 1:
        return importance
    return importance[start : start + piece.shape[0]]


def _search(x: Tensor, weight: Tensor | None, bits: int, symmetric: bool) -> Rounded:
    best = nearest(x, bits=bits, symmetric=symmetric)
    weighted = x if weight is None else x * weight
    error = _error(x, weight, best)
    full, zeros = best.scales, best.zeros

    def consider(scales: Tensor, zeros: Tensor) -> None:
        nonlocal best, error
        trial = Rounded(encode(x, scales, zeros, bits), scales, zeros)
        trial = trial._replace(scales=_best_scale(weighted, weight, trial))
        found = _error(x, weight, trial)
        wins = found < error
        best = Rounded(*(torch.where(wins, new, old) for new, old in zip(trial, best, strict=True)))
        error = torch.where(wins, found, error)

    for trial_scales, trial_zeros in _trials(full, zeros, bits, symmetric):
        consider(trial_scales, trial_zeros)
    for _ in range(_REFINEMENTS):
        consider(best.scales, best.zeros)
    return best


def _trials(full: Tensor, zeros: Tensor, bits: int, symmetric: bool) -> list[tuple[Tensor, Tensor]]:
    """Scales and zero points worth trying around those of the range that clips nothing."""
    ranges = _RANGES[bits]
    if symmetric:
        return [(sign * part * full, zeros) for part in ranges for sign in (1.0, -1.0)]
    top = 2**bits - 1
    shifts = (-1, 0, 1) if bits < 8 else (0,)
    return [(part * full, (zeros + shift).clamp(0, top)) for part in ranges for shift in shifts]


def _best_scale(weighted: Tensor, weight: Tensor | None, trial: Rounded) -> Tensor:
    """The scale (M, 1) of least error for a trial's codes."""
    centred = trial.codes - trial.zeros
    along = torch.linalg.vecdot(weighted, centred).unsqueeze(-1)
    squares = centred if weight is None else centred * weight
    length = torch.linalg.vecdot(squares, centred).unsqueeze(-1)
    # A block of zeros, or one that no error counts in: whatever scale it has is as good.
    return torch.where(length > 0, along / length.clamp(min=_TINY), trial.scales)


def _error(x: Tensor, weight: Tensor | None, trial: Rounded) -> Tensor:
    """The weighted squared error of each block, (M, 1)."""
    rest = trial.values().sub_(x)
    other = rest if weight is None else rest * weight
    error: Tensor = torch.linalg.vecdot(rest, other).unsqueeze(-1)
    return error


def _full_range(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points (M, 1) of the range that reaches every element."""
    half, top = 2.0 ** (bits - 1), 2.0**bits - 1
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if symmetric:
        extreme = torch.where(high > -low, high, low)
        return extreme / -half, torch.full_like(extreme, half)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = (high - low) / top
    return scales, encode(-low, scales, torch.zeros_like(scales), bits)


def encode(x: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes (M, block); a scale of 0, or of no size, gives the zero point."""
    inverse = torch.where(scales.abs() < _TINY, 0.0, 1.0 / scales)
    return (x * inverse).round_().add_(zeros).clamp_(0, 2**bits - 1)
