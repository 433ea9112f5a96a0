"""Muon for the matrices inside the blocks, in one optimiser with AdamW for everything else.

torch.optim.Muon knows no way to skip a step on the device, and would make the host wait for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptopt.training.parallel import gathered, own_part, part_of

_ROUNDS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero, where most singular values lie
_EPSILON = 1e-7
# The root mean square of what AdamW usually adds, over its rate: with it lr and weight decay mean
# the same for both.
_ADAM_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are added to the weights.

    It heeds `found_inf` as a fused AdamW does: where that is 1, weights and moments stay as they
    are, and no host waits to learn it. Ranks that hold parts of a matrix gather its update first.

    Args:
        hidden: matrices (N, K), and how many rows each of the projections in them has.
        rest: of all other parameters; None where there are none.
        lr: of the matrices.
        weight_decay: likewise, decoupled.
        momentum: share of the old momentum that is kept.

    Source: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks; the size of
    the update is that of Liu et al. 2025, arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        hidden: Mapping[nn.Parameter, Sequence[int]],
        rest: torch.optim.AdamW | None,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        super().__init__(
            list(hidden), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        )
        self._rows = {matrix: list(rows) for matrix, rows in hidden.items()}
        self._rest = rest
        if rest is not None:  # one optimiser to the outside
            self.param_groups += rest.param_groups
            self.state = rest.state
        self._step_supports_amp_scaling = getattr(rest, "_step_supports_amp_scaling", True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure
        """Take a step, or none where `found_inf` is 1."""
        assert closure is None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if self._rest is not None:
            self._rest.found_inf = found_inf  # type: ignore[attr-defined]  # GradScaler's
            self._rest.step()
        group = self.param_groups[0]
        for matrix in group["params"]:
            if matrix.grad is not None:
                self._update(matrix, matrix.grad, group, found_inf)

    def _update(
        self,
        matrix: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
        found_inf: Tensor | None,
    ) -> None:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        gradient, momentum = part_of(gradient), part_of(state["momentum"])
        rate, keep = group["lr"], group["momentum"]
        if found_inf is not None:  # the momentum goes on towards itself, the weights not at all
            gradient = torch.where(found_inf > 0, momentum, gradient)
            rate = rate * (1 - found_inf)
        momentum.lerp_(gradient, 1 - keep)
        ahead = gathered(gradient.lerp(momentum, keep), matrix)  # Nesterov's
        rows = self._rows[matrix]  # type: ignore[index]  # by identity
        parts = torch.split(ahead, rows)
        update = torch.cat([_sized(orthogonal(part)) for part in parts])
        weight = part_of(matrix)
        weight.mul_(1 - rate * group["weight_decay"]).sub_(rate * own_part(update, matrix))


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix (N, K) = U S V^T: all singular values come to lie near 1.

    Five Newton-Schulz rounds, in bfloat16 on a GPU.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    X = wide.bfloat16() if matrix.is_cuda else wide
    X = X / X.norm().clamp(min=_EPSILON)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X if wide is matrix else X.T).to(matrix.dtype)


def _sized(update: Tensor) -> Tensor:
    return update * (_ADAM_RMS * math.sqrt(max(update.shape)))
