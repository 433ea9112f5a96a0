"""gptopt::ffn, its training forward and its backward, as torch.library operators.

    ffn(x, weight, bias?, gate_weight?, gate_bias?, addend?, activation, recompute=False) -> out
    ffn_forward(the same without recompute) -> (out, hidden, gate)
    ffn_backward(grad, x, weight, bias?, gate_weight?, gate_bias?, addend?, hidden?, gate?,
                 activation, output_mask) -> (dx, dweight, dbias, dgate_weight, dgate_bias, daddend)

`hidden` is what goes into the activation and `gate` what multiplies it (no elements without a
gate): training keeps them for the backward, except with `recompute`. A backward that gets neither
computes them again.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd.function import once_differentiable

from gptopt.kernels import library
from gptopt.kernels.ffn import reference

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor? addend"
)


def _body(x: Tensor, *arguments: Any) -> Tensor:
    return reference.ffn(x, *arguments[:6]).contiguous()


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _forward_body(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, activation = arguments
    hidden, gate = reference.project(x, *inputs)
    out = reference.activate(hidden, gate, activation=activation)
    return out.contiguous(), hidden, x.new_empty(0) if gate is None else gate


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate_weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    gate = x.new_empty((0,) if gate_weight is None else shape)
    return x.new_empty(shape), x.new_empty(shape), gate


def _backward_body(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    addend: Tensor | None,
    hidden: Tensor | None,
    gate: Tensor | None,
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    # The reference says what the gradients are: it has no use for what was kept.
    return library.recompute_gradients(
        partial(reference.ffn, activation=activation),
        (x, weight, bias, gate_weight, gate_bias, addend),
        output_mask,
        (grad,),
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    addend: Tensor | None,
    hidden: Tensor | None,
    gate: Tensor | None,
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = (x, weight, bias, gate_weight, gate_bias, addend)
    return library.fake_gradients(inputs, output_mask)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, activation, recompute = arguments[:6], arguments[6], any(arguments[7:])
        kept: Sequence[Tensor | None] = (None, None)
        with library.below_autograd():
            if any(ctx.needs_input_grad) and not recompute:
                out, *kept = library.call("ffn_forward", *inputs, activation)
            else:
                out = library.call("ffn", *inputs, activation)
        ctx.save_for_backward(*inputs, *kept)
        ctx.activation, ctx.given = activation, len(arguments)
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = ctx.needs_input_grad[:6]
        gradients = library.call("ffn_backward", grad, *ctx.saved_tensors, ctx.activation, mask)
        return *library.masked(gradients, mask), *(None,) * (ctx.given - 6)


def _forward_flops(
    x: Size, weight: Size, bias: Size | None, gate_weight: Size | None, *_: Any, **__: Any
) -> int:
    return 2 * prod(x) * weight[0] * (1 if gate_weight is None else 2)


def _backward_flops(grad: Size, x: Size, weight: Size, *rest: Any, **__: Any) -> int:
    bias, gate_weight, _, _, hidden, _, _, output_mask = rest
    need_x, need_weight, _, need_gate_weight, *_ = output_mask
    products = need_x + need_weight
    if gate_weight is not None:
        products += need_x + need_gate_weight
    again = 0 if hidden is not None else _forward_flops(x, weight, bias, gate_weight)
    return int(again + 2 * prod(x) * weight[0] * products)


library.register(
    "ffn",
    f"({_INPUTS}, str activation, bool recompute=False) -> Tensor",
    body=_body,
    fake=_fake,
    flops=_forward_flops,
    function=_Function,
)
library.register(
    "ffn_forward",
    f"({_INPUTS}, str activation) -> (Tensor out, Tensor hidden, Tensor gate)",
    body=_forward_body,
    fake=_forward_fake,
    flops=_forward_flops,
)
library.register(
    "ffn_backward",
    f"(Tensor grad, {_INPUTS}, Tensor? hidden, Tensor? gate, str activation, bool[6] output_mask)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dgate_weight, Tensor dgate_bias,"
    " Tensor daddend)",
    body=_backward_body,
    fake=_backward_fake,
    flops=_backward_flops,
)
