"""Whether a contender is right, before anything is said about its speed.

The house's rule: the error against float64 is at most twice that of the same maths in the same
precision, plus one rounding band; in float32 2e-5 of the largest value is always allowed. All
results and all gradients count.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptopt.bench.cases import Case
from gptopt.bench.operators import (
    Call,
    Inputs,
    Outputs,
    checked_gradients,
    checked_outputs,
    checked_part,
    own_call,
)

_FLOAT32_SHARE = 2e-5
_CHUNK_ROWS = 4096  # of cross_entropy in float64, whose logits would fill any memory


@dataclass(frozen=True)
class Verdict:
    """share: the largest error as a share of what is allowed, above 1 is wrong."""

    share: float
    where: str

    @property
    def correct(self) -> bool:
        """Whether every result and gradient is within its budget."""
        return self.share <= 1.0


class Judge:
    """Holds the exact results of one case and what they allow.

    Args:
        case: what is judged.
        inputs: those that every contender gets.
        cotangents: gradients of the outputs, those that every contender gets; none: no backward.
    """

    def __init__(self, case: Case, inputs: Inputs, cotangents: Outputs) -> None:
        self.case = case
        part = checked_part(case, inputs)
        weights = checked_outputs(case, cotangents)
        self._exact = _exact(case, part, weights)
        same = _both(own_call(case, part, "reference"), part.leaves, weights)
        self._budgets = [
            self._budget(exact, found) for exact, found in zip(self._exact, same, strict=True)
        ]

    def _budget(self, exact: Tensor, same: Tensor) -> float:
        # The band's size is the largest value: a sum over many terms rounds where it is large.
        largest = _largest(exact)
        budget = 2 * _largest(same.double() - exact) + torch.finfo(self.case.dtype).eps * largest
        least = _FLOAT32_SHARE * largest if self.case.dtype == torch.float32 else 0.0
        return max(budget, least, torch.finfo(torch.float32).tiny)

    def judge(self, outputs: Outputs, gradients: Outputs) -> Verdict:
        """Compare what a contender returned."""
        found = (
            *checked_outputs(self.case, outputs),
            *checked_gradients(self.case, gradients),
        )
        if len(found) != len(self._exact):
            return Verdict(math.inf, f"{len(found)} results, {len(self._exact)} expected")
        worst = Verdict(0.0, "")
        for i, (a, e, budget) in enumerate(zip(found, self._exact, self._budgets, strict=True)):
            if a.shape != e.shape:
                return Verdict(math.inf, f"{self._name(i, len(outputs))} has another shape")
            share = _largest(a.double() - e) / budget
            if not share <= worst.share:
                worst = Verdict(share, self._name(i, len(outputs)))
        return worst

    @staticmethod
    def _name(i: int, outputs: int) -> str:
        return f"output {i}" if i < outputs else f"gradient {i - outputs}"


def _exact(case: Case, part: Inputs, cotangents: Outputs) -> Outputs:
    if case.operator == "cross_entropy":
        return _exact_cross_entropy(part, bool(cotangents))
    wide = part.to(torch.float64)
    weights = tuple(weight.double() for weight in cotangents)
    return _both(own_call(case, wide, "reference"), wide.leaves, weights)


def _exact_cross_entropy(part: Inputs, gradients: bool) -> Outputs:
    """Mean loss, and its gradients, a chunk of tokens at a time."""
    hidden, weight = (leaf.detach().double() for leaf in part.leaves)
    N, targets = hidden.shape[0], part.fixed["targets"]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, N, _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        leaves = [hidden[rows].clone().requires_grad_(), weight.requires_grad_()]
        logits = leaves[0] @ leaves[1].T
        loss = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="sum") / N
        total += loss.detach()
        if gradients:
            dx, dw = torch.autograd.grad(loss, leaves)
            dhidden[rows] = dx
            dweight += dw
    return (total, dhidden, dweight) if gradients else (total,)


def _both(call: Call, leaves: list[Tensor], cotangents: Outputs) -> Outputs:
    """Results, and gradients where there are cotangents."""
    if not cotangents:
        with torch.no_grad():
            return tuple(out.detach() for out in call(*leaves))
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = call(*own)
    gradients = torch.autograd.grad(outputs, own, cotangents)
    return (*(out.detach() for out in outputs), *gradients)


def _largest(x: Tensor) -> float:
    """The largest absolute value; infinite where anything is not finite."""
    if x.numel() == 0:
        return 0.0
    return float(x.abs().nan_to_num(nan=math.inf, posinf=math.inf).max().item())
