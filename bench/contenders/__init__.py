"""Who is measured beside whom, per operator.

Every contender computes the same function of the same leaves. Those that stand for PyTorch contain
no operator of this project. "products alone" is no contender but a bound: the matrix products that
nobody can leave out, and nothing else.
"""

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from gptopt.bench.cases import Case
from gptopt.bench.operators import Body, Call, Inputs, own_call

OURS = "gptopt"
DETERMINISTIC = "gptopt deterministic"
EAGER = "eager"
COMPILED = "torch.compile"
BOUND = "products alone"
FLASH = "SDPA flash"
CUDNN = "SDPA cuDNN"
FLEX = "FlexAttention"
LIGER = "Liger"
NAMES = (OURS, DETERMINISTIC, FLASH, CUDNN, FLEX, LIGER, COMPILED, EAGER, BOUND)

# The CUDA-graph part is left out: graphs take host time away, which `device` times never hold.
COMPILE_MODE = "max-autotune-no-cudagraphs"


class Unavailable(Exception):
    """A contender cannot take part here; the text says why."""


@dataclass(frozen=True)
class Contender:
    """build: from the case and its inputs, the call to time. around: entered for each call."""

    name: str
    build: Callable[[Case, Inputs], Call]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    bound: bool = False  # a lower bound: never judged, never said to be faster
    compiles: bool = False
    phases: tuple[str, ...] = ("forward", "backward", "full")


def contenders(case: Case, device: torch.device, *, quick: bool) -> list[Contender]:
    """All that could take part in a case; torch.compile is left out of a quick run on a CPU."""
    body: Body = "triton" if device.type == "cuda" else "reference"
    ours = [Contender(OURS, lambda case, inputs: own_call(case, inputs, body))]
    peers = importlib.import_module(f"gptopt.bench.contenders.{_MODULES[case.operator]}")
    every: list[Contender] = [*ours, *peers.contenders(case, body)]
    return [one for one in every if not (one.compiles and quick and device.type == "cpu")]


def compiled(build: Callable[[Case, Inputs], Call]) -> Contender:
    """Plain PyTorch under torch.compile."""

    def build_compiled(case: Case, inputs: Inputs) -> Call:
        return compile_call(build(case, inputs))

    return Contender(COMPILED, build_compiled, compiles=True)


def compile_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, tuned, for these shapes alone."""
    result: Callable[..., Any] = torch.compile(
        function, mode=COMPILE_MODE, dynamic=False, fullgraph=True
    )
    return result


def load(module: str, *names: str) -> list[Any]:
    """Names of a peer's module.

    Raises:
        Unavailable: it is not installed, or does not load here.
    """
    try:
        loaded = importlib.import_module(module)
        return [getattr(loaded, name) for name in names]
    except Exception as error:  # a peer may fail in any way while it loads
        package = module.partition(".")[0]
        raise Unavailable(f"{package} does not load: {type(error).__name__}: {error}") from None


_MODULES = {
    "attention": "attention",
    "attention_decode": "decode",
    "layernorm": "elementwise",
    "rotary": "elementwise",
    "ffn": "products",
    "cross_entropy": "products",
}
