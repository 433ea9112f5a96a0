"""gptopt::cross_entropy, its training forward and its backward, as torch.library operators.

    cross_entropy(hidden, head_weight, targets, options...) -> loss
    cross_entropy_forward(the same, output_mask) -> (loss, dhidden, dhead_weight)
    cross_entropy_backward(grad, hidden, head_weight, targets, dhidden?, dhead_weight?, options...,
                           output_mask) -> (dhidden, dhead_weight)

Where the loss is one number (mean, sum) the training forward finds gradients beside it, while it
has the logits: those of the summed loss, dhead_weight in float32 or wider. The backward scales them
by `grad`, over the count of tokens for a mean: no gradient is lost in half precision before a loss
scale has reached it, and no logits are kept or computed twice. With reduction "none" each token has
its own `grad`, so the backward does the work.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd.function import once_differentiable

from gptopt.kernels import library
from gptopt.kernels.cross_entropy import reference
from gptopt.kernels.dtypes import wide

_INPUTS = "Tensor hidden, Tensor head_weight, Tensor targets"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, str reduction"
_GRADIENTS = "Tensor dhidden, Tensor dhead_weight"


def _body(hidden: Tensor, head_weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
    return reference.cross_entropy(hidden, head_weight, targets, *options)


def _fake(hidden: Tensor, head_weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
    return hidden.new_empty(targets.shape if options[-1] == "none" else (), dtype=wide(hidden))


def count(targets: Tensor, ignore_index: int) -> Tensor:
    """How many targets a mean is taken over, at least 1: a () tensor, which nobody waits for."""
    return (targets != ignore_index).sum().clamp(min=1)


def _gradients(
    grad: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    options: Sequence[Any],
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    def body(hidden: Tensor, head_weight: Tensor) -> Tensor:
        return reference.cross_entropy(hidden, head_weight, targets, *options)

    return library.recompute_gradients(body, (hidden, head_weight), output_mask, (grad,))


def _forward_body(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *options, output_mask = arguments
    loss = _body(hidden, head_weight, targets, *options)
    summed = (*options[:-1], "sum")
    one = torch.ones((), dtype=loss.dtype, device=loss.device)
    dhidden, dhead = _gradients(one, hidden, head_weight, targets, summed, output_mask)
    return loss, dhidden, dhead.to(wide(dhead))


def _forward_fake(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *options, output_mask = arguments
    loss = _fake(hidden, head_weight, targets, *options)
    dhidden, dhead = library.fake_gradients((hidden, head_weight), output_mask)
    return loss, dhidden, dhead.to(wide(dhead))


def _backward_body(
    grad: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    dhidden: Tensor | None,
    dhead_weight: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *options, output_mask = arguments
    if options[-1] == "none":
        return _gradients(grad, hidden, head_weight, targets, options, output_mask)
    scale = grad / count(targets, options[0]) if options[-1] == "mean" else grad
    found = zip((dhidden, dhead_weight), output_mask, strict=True)
    return tuple(
        (x.to(scale.dtype) * scale).to(hidden.dtype)
        if wanted and x is not None
        else hidden.new_empty(0)
        for x, wanted in found
    )


def _backward_fake(
    grad: Tensor, hidden: Tensor, head_weight: Tensor, targets: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return library.fake_gradients((hidden, head_weight), arguments[-1])


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        hidden, head_weight, targets, *options = arguments
        mask = ctx.needs_input_grad[:2]
        beside = any(mask) and options[-1] != "none"
        with library.below_autograd():
            if beside:
                loss, *found = library.call("cross_entropy_forward", *arguments, mask)
            else:
                loss, found = library.call("cross_entropy", *arguments), [None, None]
        result: Tensor = loss
        ctx.save_for_backward(hidden, head_weight, targets, *found)
        ctx.options = options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = ctx.needs_input_grad[:2]
        gradients = library.call(
            "cross_entropy_backward", grad, *ctx.saved_tensors, *ctx.options, mask
        )
        return *library.masked(gradients, mask), *(None,) * 6


def _flops(hidden: Size, head_weight: Size, *_: Any, **__: Any) -> int:
    return 2 * prod(hidden) * head_weight[0]


def _forward_flops(hidden: Size, head_weight: Size, *rest: Any, **_: Any) -> int:
    output_mask: Sequence[bool] = rest[-1]
    return _flops(hidden, head_weight) * (1 + sum(output_mask))


def _backward_flops(grad: Size, hidden: Size, head_weight: Size, *rest: Any, **_: Any) -> int:
    reduction: str = rest[-2]
    return 0 if reduction != "none" else _forward_flops(hidden, head_weight, *rest)


library.register(
    "cross_entropy",
    f"({_INPUTS}, {_OPTIONS}) -> Tensor",
    body=_body,
    fake=_fake,
    flops=_flops,
    function=_Function,
)
library.register(
    "cross_entropy_forward",
    f"({_INPUTS}, {_OPTIONS}, bool[2] output_mask) -> (Tensor loss, {_GRADIENTS})",
    body=_forward_body,
    fake=_forward_fake,
    flops=_forward_flops,
)
library.register(
    "cross_entropy_backward",
    f"(Tensor grad, {_INPUTS}, Tensor? dhidden, Tensor? dhead_weight, {_OPTIONS},"
    f" bool[2] output_mask) -> ({_GRADIENTS})",
    body=_backward_body,
    fake=_backward_fake,
    flops=_backward_flops,
)
