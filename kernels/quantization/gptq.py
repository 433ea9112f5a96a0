"""Codes chosen one column after another, each making up for the errors of those before it."""

import logging

import torch
from torch import Tensor

from gptopt.kernels.quantization.descent import Columns, descend
from gptopt.kernels.quantization.rounding import encode, search

logger = logging.getLogger(__name__)

_DAMPING = 0.01  # of the mean diagonal of the Hessian
_LAZY = 128  # columns whose errors reach the rest of the matrix together
_ROWS = 4096  # rows that are taken at once: they are independent of one another


def gptq(weight: Tensor, hessian: Tensor, *, bits: int, block: int, symmetric: bool) -> Columns:
    """Quantise (N, K) so that its products with calibration inputs x change least.

    Minimises the sum over rows of e H e^T, e being the row's error, greedily along K: a column's
    rounding error is spread over the columns after it by the inverse of H. The scale of a block is
    searched when its first column is reached, in the columns as they are by then. What the greedy
    walk left is then mended by coordinate descent (descent.py).

    Args:
        weight: (N, K) float32, K a multiple of the block.
        hessian: (K, K), the mean of x^T x over inputs; float32 or float64.
        bits: 2, 4 or 8.
        block: columns that share a scale.
        symmetric: whether the zero point is fixed.

    Source: Frantar et al. 2022, arXiv:2210.17323, section 3; there scales are those of the range.
    """
    damped, spread = _factor(_filled(hessian.double()))
    parts = []
    for start in range(0, weight.shape[0], _ROWS):
        w = weight[
            start : start + _ROWS
        ].T.contiguous()  # (K, N): a column of the matrix is a row in memory
        found = _quantise(w.clone(), spread, bits, block, symmetric)
        parts.append(descend(w, found, damped, bits=bits, block=block))
    return Columns(*(torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)))


def _filled(hessian: Tensor) -> Tensor:
    """A copy in which an input that was never there counts, a little, for itself."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal <= 0] = mean if mean > 0 else 1.0
    return hessian


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """H + damping, and U, upper triangular, with U^T U = (H + damping)^-1; both float32.

    With the order of rows and columns reversed, H = R R^T for an upper triangular R, and U is the
    inverse of R: one factorisation and one triangular solve, and H itself is never inverted.
    """
    K = hessian.shape[0]
    mean = hessian.diagonal().mean()
    damping = _DAMPING
    while True:
        damped = hessian + damping * mean * torch.eye(K, dtype=hessian.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        if damping > 1e3:
            raise ValueError("hessian is not finite; expected the mean of x^T x over inputs")
        damping *= 10
        logger.info("gptq: the Hessian needs a damping of %g", damping)
    # The factor wants float64; inverting it, three quarters of the work, does not.
    spread = torch.linalg.solve_triangular(lower.flip(0, 1).float(), torch.eye(K), upper=True)
    return damped.float(), spread


def _quantise(w: Tensor, spread: Tensor, bits: int, block: int, symmetric: bool) -> Columns:
    """The greedy walk along the columns of w (K, N), which is used up."""
    K, N = w.shape
    codes = torch.empty_like(w)
    scales, zeros = torch.empty(2, K // block, N)
    # How much a column's own error counts when those after it make up for it as they can.
    importance = spread.diagonal().square().reciprocal()
    lazy = max(block, _LAZY)
    for start in range(0, K, lazy):
        end = min(start + lazy, K)
        piece, errors = w[start:end], torch.empty(end - start, N)
        local = spread[start:end, start:end]
        for j in range(end - start):
            g = (start + j) // block
            if j % block == 0:
                found = search(
                    piece[j : j + block].T.contiguous(),
                    importance[start + j : start + j + block],
                    bits=bits,
                    symmetric=symmetric,
                )
                scales[g], zeros[g] = found.scales[:, 0], found.zeros[:, 0]
            codes[start + j] = encode(piece[j], scales[g], zeros[g], bits)
            value = (codes[start + j] - zeros[g]) * scales[g]
            errors[j] = (piece[j] - value) / local[j, j]
            piece[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        w[end:].addmm_(spread[start:end, end:].T, errors, alpha=-1)
    return Columns(codes, scales, zeros)
