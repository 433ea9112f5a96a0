"""What is measured: each operator at its shapes, on a GPU, and tiny ones for a CPU.

The shapes of the targets come first and alone stay under --quick.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# In the order of worth: what is measured first when the time is short.
OPERATORS = ("cross_entropy", "layernorm", "attention", "ffn", "attention_decode", "rotary")


@dataclass(frozen=True)
class Case:
    """One operator at one shape. `sizes` are in the alphabet of gptopt.kernels."""

    operator: str
    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    target: bool = False  # a target of the project speaks about it

    @property
    def dtype_name(self) -> str:
        """torch.bfloat16 -> "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def phases(self) -> tuple[str, ...]:
        """What is timed: cross_entropy's bodies differ in where they do the gradient's work."""
        return {
            "attention_decode": ("forward",),
            "cross_entropy": ("forward", "full"),
        }.get(self.operator, ("forward", "backward", "full"))


def cases(device: torch.device, *, quick: bool, only: list[str]) -> list[Case]:
    """The cases for a device, the first to be measured first.

    `only` names operators, or "operator:word" for the cases whose name has that word.
    """
    every = _gpu() if device.type == "cuda" else _cpu()
    return [
        case
        for case in sorted(every, key=lambda case: OPERATORS.index(case.operator))
        if (not only or any(_fits(case, name) for name in only)) and (case.target or not quick)
    ]


def _fits(case: Case, name: str) -> bool:
    operator, _, word = name.partition(":")
    return case.operator == operator and (not word or word in case.name.split())


def _gpu() -> Iterator[Case]:
    for rows, C, V, target in (
        (16384, 768, 50304, True), (65536, 768, 50304, False), (8192, 4096, 128256, False),
    ):  # fmt: skip
        yield Case("cross_entropy", f"{rows} x {C}, V {V}", {"N": rows, "C": C, "V": V},
                   target=target)  # fmt: skip
    for rows, C, kind, target in (
        (4096, 768, "layer", True), (65536, 768, "layer", True), (16384, 4096, "layer", True),
        (32768, 1600, "layer", False), (16384, 4096, "rms", False), (4096, 16384, "rms", False),
    ):  # fmt: skip
        yield Case("layernorm", f"{kind} {rows} x {C} + residual", {"N": rows, "C": C},
                   {"kind": kind}, target=target)  # fmt: skip
    yield from _attention()
    for rows, C, F, activation, target in (
        (16384, 768, 3072, "gelu_tanh", True), (8192, 4096, 16384, "gelu_tanh", True),
        (16384, 1600, 6400, "gelu_tanh", False), (16384, 2048, 8192, "gelu_tanh", False),
        (16384, 768, 2048, "swiglu", False), (8192, 4096, 11008, "swiglu", False),
    ):  # fmt: skip
        yield Case("ffn", f"{activation} {rows} x {C}, F {F}", {"N": rows, "C": C, "F": F},
                   {"activation": activation}, target=target)  # fmt: skip
    for B, H, K, S, D, target in (
        (1, 12, 12, 1024, 64, True), (32, 12, 12, 1024, 64, True), (32, 32, 8, 4096, 128, False),
    ):  # fmt: skip
        yield Case("attention_decode", f"B {B}, H {H}/{K}, S {S}, d{D}",
                   {"B": B, "H": H, "K": K, "S": S, "D": D}, target=target)  # fmt: skip
    yield Case("rotary", "B 16, H 12, T 1024, d64", {"B": 16, "H": 12, "K": 12, "T": 1024, "D": 64})


def _attention() -> Iterator[Case]:
    # 16384 tokens and 2048 channels each, as the published charts have it.
    for D, T, causal, target in (
        (64, 1024, True, True), (64, 4096, True, True), (128, 8192, True, True),
        (64, 512, True, False), (64, 2048, True, False), (64, 4096, False, False),
        (128, 1024, True, False), (128, 4096, True, False), (128, 4096, False, False),
        (96, 4096, True, False),
    ):  # fmt: skip
        H = 2048 // D
        yield Case("attention", f"d{D} {'causal' if causal else 'full'} T {T}",
                   {"B": 16384 // T, "H": H, "K": H, "T": T, "D": D},
                   {"causal": causal}, target=target)  # fmt: skip
    yield Case("attention", "d128 causal T 8192, H 64/8",
               {"B": 1, "H": 64, "K": 8, "T": 8192, "D": 128}, {"causal": True})  # fmt: skip


def _cpu() -> Iterator[Case]:
    """Shapes that say nothing about speed: they let the machinery run."""
    f32 = torch.float32
    sizes = {"B": 1, "H": 2, "K": 2, "T": 64, "D": 16}
    yield Case("cross_entropy", "64 x 32, V 512", {"N": 64, "C": 32, "V": 512}, {}, f32, True)
    yield Case("layernorm", "layer 64 x 96 + residual", {"N": 64, "C": 96}, {"kind": "layer"},
               f32, True)  # fmt: skip
    yield Case("layernorm", "rms 64 x 96 + residual", {"N": 64, "C": 96}, {"kind": "rms"}, f32)
    yield Case("attention", "d16 causal T 64", sizes, {"causal": True}, f32, True)
    yield Case("attention", "d16 full T 64, H 2/1", {**sizes, "K": 1}, {"causal": False}, f32)
    yield Case("ffn", "gelu_tanh 64 x 32, F 128", {"N": 64, "C": 32, "F": 128},
               {"activation": "gelu_tanh"}, f32, True)  # fmt: skip
    yield Case("ffn", "swiglu 64 x 32, F 128", {"N": 64, "C": 32, "F": 128},
               {"activation": "swiglu"}, f32)  # fmt: skip
    yield Case("attention_decode", "B 2, H 2/1, S 64, d16",
               {"B": 2, "H": 2, "K": 1, "S": 64, "D": 16}, {}, f32, True)  # fmt: skip
    yield Case("rotary", "B 1, H 2, T 64, d16", sizes, {}, f32, True)
