"""Which body of an operator runs: decided here for all of them, said once, and answered for.

A Triton body runs where nothing stands in its way, asked in this order: it exists, triton is there,
the tensors are on a GPU that is new enough (or triton interprets), the kernels support these
arguments, and, for impl="auto", a proof of this machine holds (`gptopt.kernels.proof`).
"""

import importlib
import importlib.util
import logging
import os
from typing import Any, Literal

import torch
from torch import Tensor

from gptopt.kernels import library

Impl = Literal["auto", "reference", "triton"]
Body = Literal["reference", "triton"]

OPERATORS = ("attention", "attention_decode", "layernorm", "ffn", "cross_entropy", "rotary")
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)

_log = logging.getLogger("gptopt.kernels")
_told: set[str] = set()
_found: dict[tuple[str, torch.device], str | None] = {}


class KernelUnavailable(RuntimeError):
    """impl="triton" was asked for where no Triton kernel can run."""


def runs_triton(operator: str, impl: str, x: Tensor, *arguments: Any) -> bool:
    """Whether the Triton body of `operator` runs on `x`; the reference body runs otherwise.

    `arguments` are those of `gptopt::<operator>`: its kernels are asked whether they support them.

    Raises:
        KernelUnavailable: `impl` is "triton" and cannot be honoured; the message says why.
        ValueError: `impl` is none of the three words.
    """
    if impl == "reference":
        return False
    if impl == "auto":
        if operator not in _told and not torch.compiler.is_compiling():
            _tell(operator, x.device)
        if (_obstacle(operator, x.device) or _unproven(operator, x.device)) is not None:
            return False
        obstacle = _unsupported(operator, arguments)
        if obstacle is not None and not torch.compiler.is_compiling():
            _tell_fallback(operator, obstacle)
        return obstacle is None
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'reference' or 'triton'")
    obstacle = _obstacle(operator, x.device) or _unsupported(operator, arguments)
    if obstacle is not None:
        raise KernelUnavailable(
            f"{operator}: impl='triton' cannot run: {obstacle}; use impl='auto' or 'reference'"
        )
    return True


def explain(device: torch.device | str, *, prove: bool = False) -> dict[str, tuple[Body, str]]:
    """Per operator: the body that impl="auto" runs on `device`, and why.

    Args:
        device: where the tensors would be.
        prove: run the proofs that this machine lacks, as the first use would (at most half a
            minute on a GPU, then never again). Without, such an operator is "reference".
    """
    return {operator: _choice(operator, torch.device(device), prove) for operator in OPERATORS}


def obstacle(operator: str, device: torch.device | str) -> str | None:
    """Why the Triton body of `operator` cannot run on `device` at all; None if it can."""
    return _obstacle(operator, torch.device(device))


def _choice(operator: str, device: torch.device, prove: bool) -> tuple[Body, str]:
    obstacle = _obstacle(operator, device) or _unproven(operator, device, prove)
    return ("triton", "proven on this machine") if obstacle is None else ("reference", obstacle)


def _obstacle(operator: str, device: torch.device) -> str | None:
    """Why the Triton body of `operator` cannot run on `device`; None if it can. Loads it."""
    if (operator, device) not in _found:
        _found[operator, device] = _find(operator, device)
    return _found[operator, device]


def _find(operator: str, device: torch.device) -> str | None:
    module = f"gptopt.kernels.{operator.removesuffix('_decode')}.triton"
    if importlib.util.find_spec(module) is None:
        return "no Triton kernel of this operator exists yet"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    obstacle = _device_obstacle(device)
    if obstacle is not None:
        return obstacle
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"its kernels could not be loaded: {error}"
    if operator not in library.SUPPORTS:
        return "no Triton kernel of this operator exists yet"
    return None


def _device_obstacle(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        who = "Triton's interpreter needs the CPU" if interpreted else "Triton kernels need a GPU"
        return f"{who}, and the tensors are on {device.type}"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        return f"triton {triton.__version__} is too old, {wanted} or newer is needed"
    from gptopt.kernels import launch

    if interpreted != launch.INTERPRETED:
        return "TRITON_INTERPRET was changed after triton was imported"
    if interpreted or torch.version.hip:
        return None
    if not torch.cuda.is_available():
        return "no GPU is visible"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return "the GPU is an sm_{}{}, and the kernels need sm_80 or newer".format(*capability)
    return None


def _unproven(operator: str, device: torch.device, prove: bool = True) -> str | None:
    """Why "auto" does not trust the Triton body of `operator` on `device`; None if it does."""
    from gptopt.kernels import launch, proof

    if launch.INTERPRETED:
        return "Triton's interpreter proves kernels and speeds nothing up"
    return proof.doubt(operator, device, prove)


def _unsupported(operator: str, arguments: tuple[Any, ...]) -> str | None:
    """Why the kernels of `operator` cannot run on `arguments`; None if they can."""
    return library.SUPPORTS[operator](*arguments) if arguments else None


# torch.compile takes the answers of these as constants and does not look inside.
for _constant in (_obstacle, _unproven):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch's mark


def _tell(operator: str, device: torch.device) -> None:
    """Say which body runs: in one line for all operators, if the answer is one."""
    choice = _choice(operator, device, prove=True)
    if not _told and set(explain(device).values()) == {choice}:
        _told.update(OPERATORS)
        _log.info("operators run their %s bodies: %s", *choice)
    else:
        _told.add(operator)
        _log.info("%s runs its %s body: %s", operator, *choice)


def _tell_fallback(operator: str, obstacle: str) -> None:
    said = f"{operator}: {obstacle}"
    if said not in _told:
        _told.add(said)
        _log.info("%s runs its reference body here: %s", operator, obstacle)
