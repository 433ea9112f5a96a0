"""The handful of calls by which each operator's kernels are proven: `gptopt.kernels.proof`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., tuple[Tensor, ...]]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """name: for messages. inputs: differentiable, float64. function: by impl, of the inputs."""

    name: str
    inputs: list[Tensor]
    function: Callable[[Any], Call]
    dtype: torch.dtype


def cases(operator: str, device: torch.device) -> Iterator[Case]:
    """Every case of `operator`: odd lengths, the options that change a kernel, three dtypes.

    Sizes are small where triton interprets (`device` is the CPU).
    """
    make = _CASES[operator]
    for dtype in _DTYPES:
        generator = torch.Generator().manual_seed(11)

        def random(*shape: int, generator: torch.Generator = generator) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(device)

        for name, inputs, function in make(random, device, device.type == "cpu"):
            yield Case(f"{name} {str(dtype).removeprefix('torch.')}", inputs, function, dtype)


Random = Callable[..., Tensor]
Made = Iterator[tuple[str, list[Tensor], Callable[[Any], Call]]]


def _layernorm(random: Random, device: torch.device, small: bool) -> Made:
    from gptopt.kernels import layernorm

    seed = torch.tensor(2**40 + 3, device=device)
    for kind, C, p in (("layer", 24, 0.3), ("rms", 40, 0.0), ("layer", 1000, 0.1)):
        rows = 5 if small else 1031
        inputs = [random(rows, C) + 0.5, random(C), random(C), random(rows, C)]

        def function(impl: Any, kind: Any = kind, p: float = p) -> Call:
            return lambda x, w, b, r: layernorm(
                x,
                w,
                b,
                r,
                kind=kind,
                dropout_p=p,
                seed=seed,
                impl=impl,
            )

        yield f"{kind} {C}", inputs, function


def _rotary(random: Random, device: torch.device, small: bool) -> Made:
    from gptopt.kernels import rotary

    T = 5 if small else 517
    for D, R, interleaved in ((16, 8, False), (64, 32, True), (40, 12, False)):
        angle = random(1, T, R).float()
        inputs = [random(2, 4, T, D), random(2, 2, T, D)]

        def function(impl: Any, angle: Tensor = angle, interleaved: bool = interleaved) -> Call:
            return lambda q, k: rotary(
                q,
                k,
                angle.cos(),
                angle.sin(),
                interleaved=interleaved,
                impl=impl,
            )

        yield f"d{D} r{R}", inputs, function


def _attention(random: Random, device: torch.device, small: bool) -> Made:
    from gptopt.kernels import attention

    T = 19 if small else 301
    seed = torch.tensor(2**40 + 3, device=device)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    options: tuple[dict[str, Any], ...] = (
        {},
        {"causal": False},
        {"window": T // 3, "softcap": 15.0, "alibi_slopes": slopes},
        {"dropout_p": 0.2, "seed": seed},
    )
    for option, D in zip(options, (64, 16, 40, 128), strict=True):
        inputs = [random(2, n, T, D) for n in (4, 2, 2)]

        def function(impl: Any, option: dict[str, Any] = option) -> Call:
            def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                found = attention(q, k, v, **option, impl=impl)
                assert found.lse is not None
                return found.out, found.lse

            return call

        yield " ".join([f"d{D}", *option]), inputs, function


def _attention_decode(random: Random, device: torch.device, small: bool) -> Made:
    from gptopt.kernels import attention_decode

    M = 40 if small else 700
    for D, T, option in ((64, 1, {}), (40, 3, {"window": M // 2})):
        inputs = [random(2, n, T, D) for n in (4, 2, 2)]
        cache = [random(2, 2, M, D) for _ in range(2)]
        lengths = torch.tensor([M // 3, M - T], device=device)

        def function(
            impl: Any,
            cache: list[Tensor] = cache,
            lengths: Tensor = lengths,
            option: dict[str, Any] = option,
        ) -> Call:
            def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                keys, values = (x.to(q.dtype, copy=True) for x in cache)
                out = attention_decode(
                    q,
                    k,
                    v,
                    (keys, values),
                    lengths,
                    **option,
                    impl=impl,
                )
                return out, keys, values

            return call

        yield f"decode d{D} T{T}", inputs, function


def _ffn(random: Random, device: torch.device, small: bool) -> Made:
    from gptopt.kernels import ffn

    rows, C, F = (19, 24, 40) if small else (517, 200, 328)
    for activation in ("relu2", "gelu", "gelu_tanh", "swiglu", "geglu"):
        gated = activation in ("swiglu", "geglu")
        scale = C**-0.5
        inputs = [random(rows, C), random(F, C) * scale, random(F)]
        if gated:
            inputs += [random(F, C) * scale, random(F)]

        def function(impl: Any, activation: Any = activation) -> Call:
            def call(
                x: Tensor,
                weight: Tensor,
                bias: Tensor,
                gate_weight: Tensor | None = None,
                gate_bias: Tensor | None = None,
            ) -> tuple[Tensor, ...]:
                return (
                    ffn(
                        x,
                        weight,
                        bias,
                        activation=activation,
                        gate_weight=gate_weight,
                        gate_bias=gate_bias,
                        impl=impl,
                    ),
                )

            return call

        yield activation, inputs, function


def _cross_entropy(random: Random, device: torch.device, small: bool) -> Made:
    from gptopt.kernels import cross_entropy

    rows, C, V = (19, 16, 70) if small else (700, 128, 5003)
    targets = torch.arange(rows, device=device) * 7 % V
    targets[3] = -100
    options: tuple[dict[str, Any], ...] = (
        {},
        {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "sum"},
        {"softcap": 10.0, "reduction": "none"},
    )
    for option in options:
        inputs = [random(rows, C), random(V, C) * C**-0.5]

        def function(impl: Any, option: dict[str, Any] = option) -> Call:
            return lambda x, weight: (cross_entropy(x, weight, targets, **option, impl=impl),)

        yield " ".join(option) or "plain", inputs, function


_CASES: dict[str, Callable[[Random, torch.device, bool], Made]] = {
    "attention": _attention,
    "attention_decode": _attention_decode,
    "layernorm": _layernorm,
    "ffn": _ffn,
    "cross_entropy": _cross_entropy,
    "rotary": _rotary,
}
