"""attention: queries against keys and values, with every rule that decides who sees whom."""

from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptopt.kernels import library
from gptopt.kernels.attention import op as _op  # noqa: F401 - registers gptopt::attention
from gptopt.kernels.attention import reference
from gptopt.kernels.attention.cache import StaticCache
from gptopt.kernels.attention.checks import (
    check_cache,
    check_heads,
    check_masks,
    check_past,
    check_scores,
)
from gptopt.kernels.checks import check_dropout
from gptopt.kernels.dtypes import autocast
from gptopt.kernels.select import Impl, runs_triton

__all__ = ["AttentionOutput", "StaticCache", "attention", "attention_decode"]


class AttentionOutput(NamedTuple):
    """What `attention` returns.

    out: (B, H, T, D) in the dtype of q.
    present: keys and values of all S tokens, each (B, K, S, D): the `past` of the next call.
    lse: (B, H, T), log of the sum of exp(score) in nats, float32 (float64 for float64); -inf in a
        row that sees no key; None where it was not asked for.
    """

    out: Tensor
    present: tuple[Tensor, Tensor]
    lse: Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    key_mask: Tensor | None = None,
    doc_ids: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_lse: bool = True,
    impl: Impl = "auto",
) -> AttentionOutput:
    """Attend from the T newest tokens to all S = P + T tokens, P of them in the past.

    out = dropout(softmax(softcap(scale q k^T) + alibi, over the keys that a query sees)) v. Query i
    stands at index P + i among the keys. Statistics are float32 for lower precision and float64
    for float64. A query that sees no key gives out 0, lse -inf and gradient 0.

    Args:
        q: (B, H, T, D) float32, bfloat16, float16 or float64, any strides.
        k: (B, K, T, D), K a divisor of H: query head h reads key head h // (H / K).
        v: (B, K, T, D).
        past: keys and values of the P tokens before, each (B, K, P, D), or None.
        key_mask: (B, S) bool, True for real tokens; no query sees the others, and distances do not
            count them, so padding on either side shifts nothing.
        doc_ids: (B, S) int64 or int32; a query sees only keys with its own number.
        causal: a query sees no key behind itself.
        window: a query sees only keys at distance 0 <= d < window, itself included (so a window
            looks back, also where `causal` is False).
        softcap: c in s = c * tanh(s / c) on the scaled scores, > 0, or None.
        scale: factor on q k^T; None is 1 / sqrt(D).
        alibi_slopes: (H,), float32 advised; adds -slope * |d| to the scores. A constant.
        dropout_p: probability that an attention probability is zeroed; the others are scaled by
            1 / (1 - dropout_p). The lse is that of the undropped scores.
        seed: () int64 tensor, needed where dropout_p > 0 (see gptopt.kernels.philox).
        need_lse: False lets the reference body use torch's fused kernel where that means the same.
        impl: which body runs: "auto", "reference" or "triton".

    All floating-point tensors have one dtype, except under autocast, which casts them. Without a
    past, `present` is (k, v) themselves. Differentiable with respect to q, k, v and past, through
    out, present and lse; once through the operator and through torch's fused kernel.

    Raises:
        ValueError: a wrong shape, dtype, device or option.
        KernelUnavailable: impl="triton" where no Triton kernel can run.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Ainslie et al. 2023,
    arXiv:2305.13245, section 2 (grouped heads); Beltagy et al. 2020, arXiv:2004.05150, section 3
    (window); Press et al. 2021, arXiv:2108.12409, section 3 (ALiBi); Gemma Team 2024,
    arXiv:2408.00118, section 2 (softcap); Dao 2023, arXiv:2307.08691, section 3 (log-sum-exp).
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q.device, q, k, v)
        if past is not None:
            earlier_k, earlier_v = autocast(q.device, *past)
            past = (earlier_k, earlier_v)
    check_heads(q, k, v)
    if past is not None:
        check_past(past, k)
    if key_mask is not None or doc_ids is not None:
        check_masks(q, past, key_mask, doc_ids)
    check_scores(q, window, softcap, alibi_slopes)
    check_dropout(dropout_p, seed, q)
    past_k, past_v = past or (None, None)
    scale = 1.0 / sqrt(q.shape[3]) if scale is None else scale
    masks = (key_mask, doc_ids, alibi_slopes, seed)
    options: tuple[Any, ...] = (causal, window, softcap, scale, dropout_p)
    arguments = (q, k, v, past_k, past_v, *masks, *options)
    if torch.compiler.is_exporting() or runs_triton("attention", impl, q, *arguments):
        out, present_k, present_v, lse = library.call("attention", *arguments)
        present = (k, v) if past is None else (present_k, present_v)
        return AttentionOutput(out, present, lse if need_lse else None)
    out, present_k, present_v, lse = reference.attention(*arguments, need_lse=need_lse)
    return AttentionOutput(out, (present_k, present_v), lse if need_lse else None)


@torch.no_grad()
def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: tuple[Tensor, Tensor],
    lengths: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Append T new tokens to a StaticCache and attend causally to all that each row holds.

    The same as `attention` with each row's tokens as its past. Row b's new keys and values are
    written, in place, at positions lengths[b] .. lengths[b] + T - 1 of the cache; `lengths` stays
    as it is (StaticCache.advance counts once all layers have written).

    Args:
        q: (B, H, T, D) float32, bfloat16, float16 or float64, any strides.
        k: (B, K, T, D), K a divisor of H.
        v: (B, K, T, D).
        cache: keys and values of one layer, each (B, K, M, D): `StaticCache[layer]`.
        lengths: (B,) int64 or int32, tokens already in each row. lengths[b] + T above M is an
            IndexError on a CPU and a device-side assertion on a GPU.
        window: as in `attention`.
        softcap: as in `attention`.
        scale: as in `attention`.
        alibi_slopes: as in `attention`.
        impl: which body runs: "auto", "reference" or "triton".

    Returns out (B, H, T, D) in the dtype of q. Not differentiable; for generation, never traced.

    Raises:
        ValueError: a wrong shape, dtype, device or option.
        KernelUnavailable: impl="triton" where no Triton kernel can run.

    Source: Shazeer 2019, arXiv:1911.02150, section 2.4 (incremental attention).
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q.device, q, k, v)
    check_heads(q, k, v)
    check_cache(q, k, cache, lengths)
    check_scores(q, window, softcap, alibi_slopes)
    scale = 1.0 / sqrt(q.shape[3]) if scale is None else scale
    arguments: tuple[Any, ...] = (q, k, v, *cache, lengths, alibi_slopes, window, softcap, scale)
    if torch.compiler.is_exporting() or runs_triton("attention_decode", impl, q, *arguments):
        out: Tensor = library.call("attention_decode", *arguments)
        return out
    return reference.attention_decode(*arguments)
