"""What attention accepts: each argument against the shapes and dtypes of the docstring."""

import torch
from torch import Tensor

from gptopt.kernels.checks import (
    INTEGERS,
    check_float,
    check_like,
    check_shape,
    shape,
    wrong,
)

Pair = tuple[Tensor, Tensor]


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries (B, H, T, D), keys and values (B, K, T, D), K a divisor of H."""
    check_float("q", q)
    if q.ndim != 4:
        raise wrong("q", shape(q), "(B, H, T, D)")
    B, H, T, D = q.shape
    if D == 0:
        raise wrong("q", shape(q), "(B, H, T, D) with D of at least 1")
    if k.ndim != 4 or k.shape[0] != B or k.shape[2:] != q.shape[2:]:
        raise wrong("k", shape(k), f"(B, K, T, D) = ({B}, K, {T}, {D}) as q")
    K = k.shape[1]
    if K == 0 or H % K != 0:
        raise wrong("k", f"of {K} heads", f"a divisor of the H = {H} heads of q")
    if v.shape != k.shape:
        raise wrong("v", shape(v), f"{tuple(k.shape)} as k")
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)


def check_past(past: Pair, k: Tensor) -> None:
    """Earlier keys and values, each (B, K, P, D)."""
    if len(past) != 2:
        raise wrong("past", f"a tuple of {len(past)}", "(keys, values)")
    B, K, _, D = k.shape
    for name, x in zip(("past keys", "past values"), past, strict=True):
        if x.ndim != 4 or x.shape[:2] != k.shape[:2] or x.shape[3] != D:
            raise wrong(name, shape(x), f"(B, K, P, D) = ({B}, {K}, P, {D}) as k")
        check_like(name, x, "k", k)
    if past[1].shape != past[0].shape:
        raise wrong("past values", shape(past[1]), f"{tuple(past[0].shape)} as past keys")


def check_masks(
    q: Tensor, past: Pair | None, key_mask: Tensor | None, doc_ids: Tensor | None
) -> None:
    """A bool mask and integer document numbers over all S = P + T keys, each (B, S)."""
    for name, x in (("key_mask", key_mask), ("doc_ids", doc_ids)):
        if x is None:
            continue
        S = q.shape[2] if past is None else past[0].shape[2] + q.shape[2]
        check_shape(name, x, "(B, S) with S = P + T", q.shape[0], S)
        if name == "key_mask" and x.dtype != torch.bool:
            raise wrong(name, f"of dtype {x.dtype}", "torch.bool, True for real tokens")
        if name == "doc_ids" and x.dtype not in INTEGERS:
            raise wrong(name, f"of dtype {x.dtype}", "torch.int64 or torch.int32")
        if x.device != q.device:
            raise wrong(name, f"on {x.device}", f"{q.device} as q")


def check_scores(
    q: Tensor,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> None:
    """The options that change scores or hide keys."""
    if window is not None and window < 1:
        raise wrong("window", window, "a number of tokens of at least 1, or None")
    if softcap is not None and not softcap > 0.0:
        raise wrong("softcap", softcap, "a number above 0, or None")
    if alibi_slopes is not None:
        check_float("alibi_slopes", alibi_slopes)
        check_shape("alibi_slopes", alibi_slopes, "(H,)", q.shape[1])
        if alibi_slopes.device != q.device:
            raise wrong("alibi_slopes", f"on {alibi_slopes.device}", f"{q.device} as q")
        if alibi_slopes.requires_grad:
            raise wrong("alibi_slopes", "a tensor that requires a gradient", "a constant")


def check_cache(q: Tensor, k: Tensor, cache: Pair, lengths: Tensor) -> None:
    """A cache (B, K, M, D) with room for T more tokens, and the tokens in each of its rows."""
    B, K, T, D = k.shape
    for name, x in zip(("cache keys", "cache values"), cache, strict=True):
        if x.ndim != 4 or x.shape[:2] != k.shape[:2] or x.shape[3] != D:
            raise wrong(name, shape(x), f"(B, K, M, D) = ({B}, {K}, M, {D}) as k")
        check_like(name, x, "k", k)
    M = cache[0].shape[2]
    if cache[1].shape[2] != M:
        raise wrong("cache values", shape(cache[1]), f"{tuple(cache[0].shape)} as cache keys")
    check_shape("lengths", lengths, "(B,)", B)
    if lengths.dtype not in INTEGERS:
        raise wrong("lengths", f"of dtype {lengths.dtype}", "torch.int64 or torch.int32")
    if lengths.device != q.device:
        raise wrong("lengths", f"on {lengths.device}", f"{q.device} as q")
    if T > M:
        raise wrong("q", f"of {T} tokens", f"at most M = {M}, the size of the cache")
