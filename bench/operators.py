"""Each operator as the bench sees it: its inputs, its least work, and the call that defines it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gptopt.bench.cases import Case
from gptopt.bench.limits import Work
from gptopt.kernels import (
    attention,
    attention_decode,
    cross_entropy,
    ffn,
    layernorm,
    rotary,
)

Outputs = tuple[Tensor, ...]
Call = Callable[..., Outputs]  # of the leaves, in their order
Body = Literal["reference", "triton"]


@dataclass
class Inputs:
    """Tensors of one case: `leaves` want gradients, `fixed` are constants by name."""

    leaves: list[Tensor]
    fixed: dict[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """A copy in another precision; integers stay."""
        return Inputs(
            [leaf.to(dtype, copy=True) for leaf in self.leaves],
            {
                name: x.to(dtype, copy=True) if x.is_floating_point() else x
                for name, x in self.fixed.items()
            },
        )


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random inputs in the case's dtype, the same for every contender."""
    generator = torch.Generator(device).manual_seed(1234)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        x = torch.randn(shape, device=device, generator=generator)
        return (x * std).to(case.dtype)

    return _INPUTS[case.operator](case, normal, device)


def make_cotangents(case: Case, device: torch.device) -> Outputs:
    """Random gradients of the outputs, the same for every contender; () without a backward."""
    if "full" not in case.phases:
        return ()
    if case.operator == "cross_entropy":
        return (torch.ones((), device=device),)
    generator = torch.Generator(device).manual_seed(4321)
    return tuple(
        torch.randn(shape, device=device, generator=generator).to(case.dtype)
        for shape in _output_shapes(case)
    )


def _output_shapes(case: Case) -> list[tuple[int, ...]]:
    s = case.sizes
    match case.operator:
        case "layernorm":
            return [(s["N"], s["C"])] * 2
        case "ffn":
            return [(s["N"], s["F"])]
        case "rotary":
            return [(s["B"], n, s["T"], s["D"]) for n in (s["H"], s["K"])]
        case _:
            return [(s["B"], s["H"], s["T"], s["D"])]


def own_call(case: Case, inputs: Inputs, body: Body) -> Call:
    """The operator of this project, with the named body."""
    return _OWN[case.operator](case, inputs.fixed, body)


def least_work(case: Case, phase: str) -> Work:
    """The fewest operations and bytes of a phase; "full" is forward and backward together."""
    if phase == "full":
        parts = [_WORK[case.operator](case, part) for part in ("forward", "backward")]
        return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))
    return _WORK[case.operator](case, phase)


def checked_part(case: Case, inputs: Inputs) -> Inputs:
    """As much of the inputs as is compared with float64: all, or of attention one head group.

    The heads of attention know nothing of each other, and all of them in float64 would fill any
    memory.
    """
    if case.operator != "attention":
        return inputs
    return Inputs([leaf[:1, : _group(case, i)] for i, leaf in enumerate(inputs.leaves)])


def checked_outputs(case: Case, outputs: Outputs) -> Outputs:
    """The same part of what a call over all inputs returned."""
    if case.operator != "attention":
        return outputs
    return tuple(out[:1, : _group(case, 0)] for out in outputs)


def checked_gradients(case: Case, gradients: Outputs) -> Outputs:
    """The same part of the gradients of all leaves."""
    if case.operator != "attention":
        return gradients
    return tuple(grad[:1, : _group(case, i)] for i, grad in enumerate(gradients))


def _group(case: Case, leaf: int) -> int:
    return case.sizes["H"] // case.sizes["K"] if leaf == 0 else 1


# --- inputs ---------------------------------------------------------------------------------------

Normal = Callable[..., Tensor]


def _attention_inputs(case: Case, normal: Normal, device: torch.device) -> Inputs:
    s = case.sizes
    heads = (s["H"], s["K"], s["K"])
    return Inputs([normal(s["B"], n, s["T"], s["D"]) for n in heads])


def _decode_inputs(case: Case, normal: Normal, device: torch.device) -> Inputs:
    s = case.sizes
    cache = {name: normal(s["B"], s["K"], s["S"], s["D"]) for name in ("keys", "values")}
    # Each row has its own length, and the longest fills the cache with the token to come.
    lengths = s["S"] - 1 - torch.arange(s["B"], device=device) % 7
    return Inputs(
        [normal(s["B"], n, 1, s["D"]) for n in (s["H"], s["K"], s["K"])],
        {**cache, "lengths": lengths},
    )


def _layernorm_inputs(case: Case, normal: Normal, device: torch.device) -> Inputs:
    N, C = case.sizes["N"], case.sizes["C"]
    leaves = [normal(N, C) + 0.5, normal(N, C), normal(C, std=0.1) + 1.0]
    return Inputs(leaves + ([normal(C, std=0.1)] if case.options["kind"] == "layer" else []))


def _ffn_inputs(case: Case, normal: Normal, device: torch.device) -> Inputs:
    N, C, F = (case.sizes[name] for name in "NCF")
    leaves = [normal(N, C), normal(F, C, std=C**-0.5), normal(F, std=0.1)]
    if case.options["activation"] == "swiglu":
        leaves += [normal(F, C, std=C**-0.5), normal(F, std=0.1)]
    return Inputs(leaves)


def _cross_entropy_inputs(case: Case, normal: Normal, device: torch.device) -> Inputs:
    N, C, V = (case.sizes[name] for name in "NCV")
    targets = torch.arange(N, device=device) * 7919 % V
    return Inputs([normal(N, C), normal(V, C, std=C**-0.5)], {"targets": targets})


def _rotary_inputs(case: Case, normal: Normal, device: torch.device) -> Inputs:
    s = case.sizes
    frequencies = 10000.0 ** (-torch.arange(0, s["D"], 2, device=device) / s["D"])
    angle = torch.arange(s["T"], device=device)[:, None] * frequencies  # (T, R)
    leaves = [normal(s["B"], n, s["T"], s["D"]) for n in (s["H"], s["K"])]
    return Inputs(leaves, {"cos": angle.cos()[None], "sin": angle.sin()[None]})


_INPUTS: dict[str, Callable[[Case, Normal, torch.device], Inputs]] = {
    "attention": _attention_inputs,
    "attention_decode": _decode_inputs,
    "layernorm": _layernorm_inputs,
    "ffn": _ffn_inputs,
    "cross_entropy": _cross_entropy_inputs,
    "rotary": _rotary_inputs,
}


# --- this project's operators ---------------------------------------------------------------------

Fixed = dict[str, Tensor]


def _own_attention(case: Case, fixed: Fixed, body: Body) -> Call:
    causal = bool(case.options["causal"])
    return lambda q, k, v: (attention(q, k, v, causal=causal, impl=body).out,)


def _own_decode(case: Case, fixed: Fixed, body: Body) -> Call:
    cache, lengths = (fixed["keys"], fixed["values"]), fixed["lengths"]
    return lambda q, k, v: (attention_decode(q, k, v, cache, lengths, impl=body),)


def _own_layernorm(case: Case, fixed: Fixed, body: Body) -> Call:
    kind = case.options["kind"]

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Outputs:
        return layernorm(x, weight, bias, residual, kind=kind, impl=body)

    return call


def _own_ffn(case: Case, fixed: Fixed, body: Body) -> Call:
    activation = case.options["activation"]

    def call(x: Tensor, weight: Tensor, bias: Tensor, *gate: Tensor) -> Outputs:
        gates: dict[str, Any] = dict(zip(("gate_weight", "gate_bias"), gate, strict=False))
        return (ffn(x, weight, bias, activation=activation, **gates, impl=body),)

    return call


def _own_cross_entropy(case: Case, fixed: Fixed, body: Body) -> Call:
    targets = fixed["targets"]
    return lambda hidden, weight: (cross_entropy(hidden, weight, targets, impl=body),)


def _own_rotary(case: Case, fixed: Fixed, body: Body) -> Call:
    cos, sin = fixed["cos"], fixed["sin"]
    return lambda q, k: rotary(q, k, cos, sin, impl=body)


_OWN: dict[str, Callable[[Case, Fixed, Body], Call]] = {
    "attention": _own_attention,
    "attention_decode": _own_decode,
    "layernorm": _own_layernorm,
    "ffn": _own_ffn,
    "cross_entropy": _own_cross_entropy,
    "rotary": _own_rotary,
}


# --- least work -----------------------------------------------------------------------------------


def _attention_work(case: Case, phase: str) -> Work:
    B, H, K, T, D = (case.sizes[name] for name in "BHKTD")
    flops = 4 * B * H * T * T * D * (0.5 if case.options["causal"] else 1.0)
    queries, keys, rows = B * H * T * D, 2 * B * K * T * D, B * H * T
    size = case.dtype.itemsize
    if phase == "forward":
        return Work(flops, size * (2 * queries + keys) + 4 * rows)
    # Five products instead of two; reads q k v out dout lse, writes dq dk dv.
    return Work(2.5 * flops, size * (4 * queries + 2 * keys) + 4 * rows)


def _decode_work(case: Case, phase: str) -> Work:
    B, H, K, S, D = (case.sizes[name] for name in "BHKSD")
    return Work(4 * B * H * S * D, case.dtype.itemsize * 2 * B * D * (K * S + H))


def _layernorm_work(case: Case, phase: str) -> Work:
    N, C = case.sizes["N"], case.sizes["C"]
    # Forward reads x and residual, writes the norm and the sum; backward reads both of their
    # gradients and the sum, and writes one gradient for both branches.
    return Work(8.0 * N * C, case.dtype.itemsize * 4.0 * N * C)


def _ffn_work(case: Case, phase: str) -> Work:
    N, C, F = (case.sizes[name] for name in "NCF")
    branches = 2 if case.options["activation"] == "swiglu" else 1
    flops = 2 * N * C * F * branches
    x, weights, out = N * C, branches * C * F, N * F
    size = case.dtype.itemsize
    if phase == "forward":
        return Work(flops, size * (x + weights + (1 + branches) * out))
    return Work(2 * flops, size * (2 * x + 2 * weights + (1 + branches) * out))


def _cross_entropy_work(case: Case, phase: str) -> Work:
    N, C, V = (case.sizes[name] for name in "NCV")
    flops, size = 2 * N * C * V, case.dtype.itemsize
    return Work(flops * (1 if phase == "forward" else 2), size * (N * C + V * C) + 8 * N)


def _rotary_work(case: Case, phase: str) -> Work:
    B, H, K, T, D = (case.sizes[name] for name in "BHKTD")
    elements = B * (H + K) * T * D
    return Work(3 * elements, case.dtype.itemsize * 2 * elements)


_WORK: dict[str, Callable[[Case, str], Work]] = {
    "attention": _attention_work,
    "attention_decode": _decode_work,
    "layernorm": _layernorm_work,
    "ffn": _ffn_work,
    "cross_entropy": _cross_entropy_work,
    "rotary": _rotary_work,
}
