"""Mending codes and scales: every code and every scale once more, given all the others.

Error feedback decides on each column once, when those after it are still exact. Here each decision
is made again with the errors of all others known, so the error only falls. It works on transposed
matrices (K, N), whose columns are rows in memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptopt.kernels.quantization.rounding import encode

_SWEEPS = 2
_LAZY = 128  # columns whose changes reach the gradient of the others together
_SYSTEMS = 2**22  # elements of the systems of equations that are solved at once


class Columns(NamedTuple):
    """Codes (K, N), scales (G, N) and zero points (G, N) of a transposed matrix, all float32."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """What the codes stand for, (K, N)."""
        scales, zeros = self.spread()
        return (self.codes - zeros) * scales

    def spread(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of each code, both (K, N)."""
        block = self.codes.shape[0] // self.scales.shape[0]
        return self.scales.repeat_interleave(block, 0), self.zeros.repeat_interleave(block, 0)


def descend(w: Tensor, found: Columns, hessian: Tensor, *, bits: int, block: int) -> Columns:
    """Codes and scales of less error e^T H e, e being a row of w minus what its codes stand for.

    Args:
        w: (K, N) float32, the transposed weight.
        found: codes to begin with; they are changed.
        hessian: (K, K) float32, positive definite.
        bits: 2, 4 or 8.
        block: columns that share a scale.

    Source: cyclic coordinate descent, as Behdin et al. 2023, arXiv:2309.01885, section 3.
    """
    target = hessian @ w
    found = found._replace(scales=_best_scales(target, found, hessian, block))
    for _ in range(_SWEEPS):
        _sweep(target, found, hessian, bits)
    return found._replace(scales=_best_scales(target, found, hessian, block))


def _sweep(target: Tensor, found: Columns, hessian: Tensor, bits: int) -> None:
    """Give each column in turn the code that is best beside all others as they are.

    `target` is H w^T, (K, N).
    """
    K, N = target.shape
    scales, zeros = found.spread()
    values = (found.codes - zeros) * scales
    gradient = target - hessian @ values
    diagonal = hessian.diagonal()
    for start in range(0, K, _LAZY):
        end = min(start + _LAZY, K)
        local, block = gradient[start:end], hessian[start:end, start:end]
        changes = torch.empty(end - start, N)
        for j in range(end - start):
            k = start + j
            wanted = torch.addcdiv(values[k], local[j], diagonal[k])
            found.codes[k] = encode(wanted, scales[k], zeros[k], bits)
            value = (found.codes[k] - zeros[k]) * scales[k]
            changes[j] = value - values[k]
            values[k] = value
            local.addr_(block[:, j], changes[j], alpha=-1)
        gradient[end:].addmm_(hessian[end:, start:end], changes, alpha=-1)


def _best_scales(target: Tensor, found: Columns, hessian: Tensor, block: int) -> Tensor:
    """The scales (G, N) of least error for given codes: one system of G equations per row."""
    G = found.scales.shape[0]
    step = max(1, _SYSTEMS // G**2)
    columns = range(0, target.shape[1], step)
    return torch.cat(
        [
            _solve(hessian, block, *(part[:, start : start + step] for part in (target, *found)))
            for start in columns
        ],
        dim=1,
    )


def _solve(
    hessian: Tensor, block: int, target: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor
) -> Tensor:
    centred = codes - zeros.repeat_interleave(block, 0)
    G = scales.shape[0]
    cut = centred.view(G, block, -1)  # (G, block, N)

    def along(x: Tensor) -> Tensor:  # (K, N) -> (N, G): each block's product with its codes
        found: Tensor = (x.view(G, block, -1) * cut).sum(1).T
        return found

    system = torch.stack(
        [along(hessian[:, g * block : (g + 1) * block] @ cut[g]) for g in range(G)], dim=-1
    ).double()  # (N, G, G)
    diagonal = system.diagonal(dim1=1, dim2=2)
    # A block whose codes are all zero points has any scale; the rest of the row must not mind.
    diagonal += 1e-8 * diagonal.mean(1, keepdim=True) + 1e-30
    right = along(target).double().unsqueeze(-1)
    solved = torch.linalg.solve_ex(system, right)[0].squeeze(-1).T.float()
    return torch.where(torch.isfinite(solved), solved, scales)
