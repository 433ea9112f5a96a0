"""Which body of an operator runs: decided here for all of them, said once, and answered for."""

import logging
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]
Body = Literal["reference", "triton"]

OPERATORS = ("attention", "attention_decode", "layernorm", "ffn", "cross_entropy", "rotary")
TRITON_OPERATORS: frozenset[str] = frozenset()  # those whose Triton kernels exist

_log = logging.getLogger("gptopt.kernels")
_told: set[str] = set()


class KernelUnavailable(RuntimeError):
    """impl="triton" was asked for where no Triton kernel can run."""


def runs_triton(operator: str, impl: str, x: Tensor) -> bool:
    """Whether the Triton body of `operator` runs on `x`; the reference body runs otherwise.

    Raises:
        KernelUnavailable: `impl` is "triton" and cannot be honoured; the message says why.
        ValueError: `impl` is none of the three words.
    """
    if impl == "reference":
        return False
    if impl == "auto":
        if operator not in _told and not torch.compiler.is_compiling():
            _tell(operator, x)
        return operator in TRITON_OPERATORS and _obstacle(operator, x.device) is None
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'reference' or 'triton'")
    obstacle = _obstacle(operator, x.device)
    if obstacle is not None:
        raise KernelUnavailable(
            f"{operator}: impl='triton' cannot run: {obstacle}; use impl='auto' or 'reference'"
        )
    return True


def explain(device: torch.device | str) -> dict[str, tuple[Body, str]]:
    """Per operator: the body that impl="auto" runs on `device`, and why."""
    return {operator: _choice(operator, torch.device(device)) for operator in OPERATORS}


def _choice(operator: str, device: torch.device) -> tuple[Body, str]:
    obstacle = _obstacle(operator, device)
    return ("triton", f"tensors on {device.type}") if obstacle is None else ("reference", obstacle)


def _obstacle(operator: str, device: torch.device) -> str | None:
    """Why the Triton body of `operator` cannot run on `device`; None if it can."""
    if operator not in TRITON_OPERATORS:
        return "no Triton kernel of this operator exists yet"
    if device.type != "cuda":
        return f"Triton kernels need a GPU, and the tensors are on {device.type}"
    return None


def _tell(operator: str, x: Tensor) -> None:
    _told.add(operator)
    body, reason = _choice(operator, x.device)
    _log.info("%s runs its %s body: %s", operator, body, reason)
