"""gptopt::attention, its backward and gptopt::attention_decode, as torch.library operators.

    attention(q, k, v, past_k?, past_v?, key_mask?, doc_ids?, alibi_slopes?, seed?,
              causal, window?, softcap?, scale, dropout_p) -> (out, present_k, present_v, lse)
    attention_backward(grad_out, grad_lse?, q, keys, values, out, lse, key_mask?, doc_ids?,
                       alibi_slopes?, seed?, causal, window?, softcap?, scale, dropout_p)
        -> (dq, dkeys, dvalues)
    attention_decode(q, k, v, cache_k!, cache_v!, lengths, alibi_slopes?, window?, softcap?, scale)
        -> out

The presents have no elements where they would be k and v themselves (no past). The backward sees
all S keys and values at once; the Function cuts their gradients at the end of the past.
"""

from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd.function import once_differentiable

from gptopt.kernels import library
from gptopt.kernels.attention import reference
from gptopt.kernels.dtypes import wide

_MASKS = "Tensor? key_mask, Tensor? doc_ids, Tensor? alibi_slopes, Tensor? seed"
_OPTIONS = "bool causal, SymInt? window, float? softcap, float scale, float dropout_p"
_N_MASKS = 4


def _body(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    out, present_k, present_v, lse = reference.attention(q, k, v, past_k, *arguments, need_lse=True)
    assert lse is not None
    if past_k is None:
        present_k, present_v = k.new_empty(0), v.new_empty(0)
    return out.contiguous(), present_k, present_v, lse.contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    B, K, T, D = k.shape
    present = (0,) if past_k is None else (B, K, past_k.shape[2] + T, D)
    lse = q.new_empty(q.shape[:3], dtype=wide(q))
    return q.new_empty(q.shape), k.new_empty(present), v.new_empty(present), lse


def _backward_body(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    def body(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, _, _, lse = reference.attention(q, k, v, None, None, *arguments, need_lse=True)
        assert lse is not None
        return out, lse

    return library.recompute_gradients(body, (q, keys, values), (True,) * 3, (grad_out, grad_lse))


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, keys: Tensor, values: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return library.fake_gradients((q, keys, values), (True,) * 3)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        q, k, v, past_k, _, *rest = arguments
        with library.below_autograd():
            out, present_k, present_v, lse = library.call("attention", *arguments)
        if past_k is None:
            ctx.mark_non_differentiable(present_k, present_v)
        keys, values = (k, v) if past_k is None else (present_k, present_v)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, keys, values, out, lse, *rest[:_N_MASKS])
        ctx.options = rest[_N_MASKS:]
        ctx.P = 0 if past_k is None else past_k.shape[2]
        return out, present_k, present_v, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_out: Tensor | None,
        grad_k: Tensor | None,
        grad_v: Tensor | None,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            grad_out = torch.zeros_like(ctx.saved_tensors[0])
        dq, dk, dv = library.call(
            "attention_backward", grad_out, grad_lse, *ctx.saved_tensors, *ctx.options
        )
        dk = dk if grad_k is None else dk + grad_k
        dv = dv if grad_v is None else dv + grad_v
        P = ctx.P
        gradients = (dq, dk[:, :, P:], dv[:, :, P:], dk[:, :, :P], dv[:, :, :P])
        none = (None,) * (len(ctx.options) + _N_MASKS)
        return *library.masked(gradients, ctx.needs_input_grad[:5]), *none


def _decode_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _decode_body(q: Tensor, *arguments: Any) -> Tensor:
    return reference.attention_decode(q, *arguments).contiguous()


# Two products forward, five backward, masked or not: as torch counts its own attention.
def _flops(q: Size, k: Size, v: Size, past_k: Size | None, *_: Any, **__: Any) -> int:
    S = k[2] + (0 if past_k is None else past_k[2])
    return 2 * 2 * prod(q) * S


def _backward_flops(grad_out: Any, grad_lse: Any, q: Size, keys: Size, *_: Any, **__: Any) -> int:
    return 5 * 2 * prod(q) * keys[2]


def _decode_flops(q: Size, k: Size, v: Size, cache_k: Size, *_: Any, **__: Any) -> int:
    return 2 * 2 * prod(q) * cache_k[2]


library.register(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, {_MASKS}, {_OPTIONS})"
    " -> (Tensor out, Tensor present_k, Tensor present_v, Tensor lse)",
    body=_body,
    fake=_fake,
    flops=_flops,
    function=_Function,
)
library.register(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor keys, Tensor values, Tensor out,"
    f" Tensor lse, {_MASKS}, {_OPTIONS}) -> (Tensor dq, Tensor dkeys, Tensor dvalues)",
    body=_backward_body,
    fake=_backward_fake,
    flops=_backward_flops,
)
library.register(
    "attention_decode",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor lengths,"
    " Tensor? alibi_slopes, SymInt? window, float? softcap, float scale) -> Tensor",
    body=_decode_body,
    fake=_decode_fake,
    flops=_decode_flops,
)
