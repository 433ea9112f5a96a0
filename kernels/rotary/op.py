"""gptopt::rotary and its backward, as torch.library operators.

    rotary(q, k, cos, sin, interleaved) -> (q, k)
    rotary_backward(grad_q, grad_k, cos, sin, interleaved) -> (dq, dk)

A rotation's gradient is the rotation by the opposite angle: nothing of q and k is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptopt.kernels import library
from gptopt.kernels.rotary import reference

Pair = tuple[Tensor, Tensor]


def _body(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Pair:
    q, k = reference.rotary(q, k, cos, sin, interleaved)
    return q.contiguous(), k.contiguous()


def _backward_body(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Pair:
    return _body(grad_q, grad_k, cos, -sin, interleaved)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Pair:
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> Pair:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        with library.below_autograd():
            pair: Pair = library.call("rotary", q, k, cos, sin, interleaved)
        return pair

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        gradients = library.call(
            "rotary_backward", grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved
        )
        return *library.masked(gradients, ctx.needs_input_grad[:2]), None, None, None


library.register(
    "rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    body=_body,
    fake=_fake,
    flops=library.no_flops,
    function=_Function,
)
library.register(
    "rotary_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    body=_backward_body,
    fake=_fake,
    flops=library.no_flops,
)
