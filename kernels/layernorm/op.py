"""gptopt::layernorm and its backward, as torch.library operators.

    layernorm(x, weight?, bias?, residual?, seed?, kind, eps, dropout_p) -> (y, h)
    layernorm_backward(grad_y?, grad_h?, h, weight?, bias?, seed?, kind, eps, dropout_p,
                       output_mask) -> (dx, dh, dweight, dbias)

`h` has no elements where it would be `x` itself (no residual, no dropout). The backward starts from
h, not from x: it reads one tensor, finds the statistics again from the row it has read, and draws
the mask again. `dh` is the residual's gradient; `dx` has no elements where it equals `dh`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptopt.kernels import library
from gptopt.kernels.layernorm import reference
from gptopt.kernels.philox import drop


def _body(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    y, h = reference.layernorm(x, weight, bias, residual, seed, kind, eps, dropout_p)
    return y.contiguous(), x.new_empty(0) if h is x else h.contiguous()


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    if residual is None:
        h = x.new_empty(x.shape if dropout_p > 0.0 else (0,))
        return x.new_empty(x.shape), h
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)


def _backward_body(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def body(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.norm(h, weight, bias, kind, eps), h.view_as(h)

    dh, dweight, dbias = library.recompute_gradients(
        body, (h, weight, bias), output_mask, (grad_y, grad_h)
    )
    if dropout_p == 0.0 or not output_mask[0]:
        return h.new_empty(0), dh, dweight, dbias
    assert seed is not None
    return drop(dh, dropout_p, seed), dh, dweight, dbias


def _backward_fake(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dh, dweight, dbias = library.fake_gradients((h, weight, bias), output_mask)
    dx = h.new_empty(h.shape if output_mask[0] and dropout_p > 0.0 else (0,))
    return dx, dh, dweight, dbias


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        kind: str,
        eps: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        with library.below_autograd():
            y, h = library.call("layernorm", x, weight, bias, residual, seed, kind, eps, dropout_p)
        h_is_x = residual is None and dropout_p == 0.0
        if h_is_x:
            ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if h_is_x else h, weight, bias, seed)
        ctx.options = (kind, eps, dropout_p)
        ctx.dtype = x.dtype
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None) -> tuple[Any, ...]:
        need_x, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        dx, dh, dweight, dbias = library.call(
            "layernorm_backward",
            grad_y,
            grad_h,
            *ctx.saved_tensors,
            *ctx.options,
            (need_x or need_residual, need_weight, need_bias),
        )
        dropped = ctx.options[-1] > 0.0
        return (
            (dx if dropped else dh).to(ctx.dtype) if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dh if need_residual else None,
            *(None,) * 4,
        )


library.register(
    "layernorm",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed,"
    " str kind, float eps, float dropout_p) -> (Tensor y, Tensor h)",
    body=_body,
    fake=_fake,
    flops=library.no_flops,
    function=_Function,
)
library.register(
    "layernorm_backward",
    "(Tensor? grad_y, Tensor? grad_h, Tensor h, Tensor? weight, Tensor? bias, Tensor? seed,"
    " str kind, float eps, float dropout_p, bool[3] output_mask)"
    " -> (Tensor dx, Tensor dh, Tensor dweight, Tensor dbias)",
    body=_backward_body,
    fake=_backward_fake,
    flops=library.no_flops,
)
