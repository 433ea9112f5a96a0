"""The calls that configurations are tuned with: a GPT's, large enough to fill a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gptopt.kernels.proof_cases import Call, Case

_DTYPE = torch.bfloat16


def workloads(operator: str, device: torch.device) -> Iterator[Case]:
    """Every case of `operator`, in bfloat16; inputs are the float64 that the proof wants."""
    generator = torch.Generator().manual_seed(13)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float64)

    for name, inputs, function in _CASES[operator](random, device):
        yield Case(name, inputs, function, _DTYPE)


Random = Callable[..., Tensor]
Made = Iterator[tuple[str, list[Tensor], Callable[[Any], Call]]]


def _attention(random: Random, device: torch.device) -> Made:
    from gptopt.kernels import attention

    for D, H, K in ((64, 12, 12), (128, 16, 4)):
        inputs = [random(2, n, 1024, D) for n in (H, K, K)]

        def function(impl: Any) -> Call:
            return lambda q, k, v: (attention(q, k, v, impl=impl).out,)

        yield f"causal d{D}", inputs, function


def _attention_decode(random: Random, device: torch.device) -> Made:
    from gptopt.kernels import attention_decode

    for D, H, K in ((64, 12, 12), (128, 32, 8)):
        inputs = [random(8, n, 1, D) for n in (H, K, K)]
        cache = [random(8, K, 1024, D) for _ in range(2)]
        lengths = torch.full((8,), 900, device=device)

        def function(impl: Any, cache: list[Tensor] = cache, lengths: Tensor = lengths) -> Call:
            own: list[Tensor] = []  # written in place, always with the same: made once

            def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                if not own:
                    own.extend(x.to(q.dtype, copy=True) for x in cache)
                return (attention_decode(q, k, v, (own[0], own[1]), lengths, impl=impl),)

            return call

        yield f"decode d{D}", inputs, function


def _layernorm(random: Random, device: torch.device) -> Made:
    from gptopt.kernels import layernorm

    for C in (768, 1024, 1600, 2048, 4096):
        inputs = [random(8192, C), random(C), random(C), random(8192, C)]

        def function(impl: Any) -> Call:
            return lambda x, w, b, r: layernorm(x, w, b, r, impl=impl)

        yield f"width {C}", inputs, function


def _ffn(random: Random, device: torch.device) -> Made:
    from gptopt.kernels import ffn

    for activation, C, F in (("gelu_tanh", 768, 3072), ("swiglu", 1024, 2816)):
        gated = activation == "swiglu"
        inputs = [random(4096, C), random(F, C) * C**-0.5, *([random(F, C) * C**-0.5] * gated)]

        def function(impl: Any, activation: Any = activation) -> Call:
            return lambda x, weight, gate=None: (
                ffn(x, weight, None, activation=activation, gate_weight=gate, impl=impl),
            )

        yield f"{activation} {C}", inputs, function


def _cross_entropy(random: Random, device: torch.device) -> Made:
    from gptopt.kernels import cross_entropy

    targets = torch.arange(2048, device=device) * 7
    inputs = [random(2048, 768), random(50304, 768) * 768**-0.5]

    def function(impl: Any) -> Call:
        return lambda x, weight: (cross_entropy(x, weight, targets, impl=impl),)

    yield "50304 words", inputs, function


def _rotary(random: Random, device: torch.device) -> Made:
    from gptopt.kernels import rotary

    for D in (64, 128):
        angle = random(1, 1024, D // 2).float()
        inputs = [random(8, 12, 1024, D), random(8, 12, 1024, D)]

        def function(impl: Any, angle: Tensor = angle) -> Call:
            return lambda q, k: rotary(q, k, angle.cos(), angle.sin(), impl=impl)

        yield f"d{D}", inputs, function


_CASES: dict[str, Callable[[Random, torch.device], Made]] = {
    "attention": _attention,
    "attention_decode": _attention_decode,
    "layernorm": _layernorm,
    "ffn": _ffn,
    "cross_entropy": _cross_entropy,
    "rotary": _rotary,
}
