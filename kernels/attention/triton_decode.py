"""Attention of a few new tokens against a long cache, in Triton: the cache split over programs.

Each program appends or reads its part of one key head's row, for all query heads that share it,
and a second kernel joins the parts by their log-sum-exp.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptopt.kernels.attention.triton_forward import attend
from gptopt.kernels.attention.triton_scores import (
    Masks,
    head_rows,
    load_block,
    padded_dim,
    shape_class,
)
from gptopt.kernels.launch import (
    INTERPRETED,
    arch,
    cast,
    choose,
    jit,
    launch,
    sm_count,
)

MAX_SPLITS = 64
# A full row is a device-side assertion, as it is in torch's own indexing. The interpreter has none.
_ASSERTING = {} if INTERPRETED else {"debug": True, "sanitize_overflow": False}


# One token is no kernel of its own: its loop unrolled spilled, and a cold start compiled twice.
@partial(jit, do_not_specialize=["T"])
def attention_decode_kernel(
    q: tl.tensor,  # (B, H, T, D)
    k: tl.tensor,  # (B, K, T, D)
    v: tl.tensor,  # (B, K, T, D)
    cache_k: tl.tensor,  # (B, K, M, D), written at lengths[b] ..
    cache_v: tl.tensor,  # (B, K, M, D), the same
    lengths: tl.tensor,  # (B,) integer
    out: tl.tensor,  # (B, H, T, D) in the dtype of q, or (SPLITS, B, H, T, D) fp32, contiguous
    lse2: tl.tensor,  # (SPLITS, B, H, T) fp32 in the log2 domain, or None
    slopes: tl.tensor,  # (H,) fp32, times log2(e), or None
    stride_qb: tl.tensor,
    stride_qh: tl.tensor,
    stride_qt: tl.tensor,
    stride_kb: tl.tensor,
    stride_kh: tl.tensor,
    stride_kt: tl.tensor,
    stride_vb: tl.tensor,
    stride_vh: tl.tensor,
    stride_vt: tl.tensor,
    stride_ckb: tl.tensor,
    stride_ckh: tl.tensor,
    stride_ckt: tl.tensor,
    stride_cvb: tl.tensor,
    stride_cvh: tl.tensor,
    stride_cvt: tl.tensor,
    B: tl.tensor,
    H: tl.tensor,
    group: tl.tensor,
    T: tl.tensor,
    M: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    SPLITS: tl.constexpr,
    FOLD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One part of one row of the cache per program, the last part with the new tokens.

    Nobody reads from the cache what is appended here: the new tokens are read from k and v.
    """
    tiles = tl.cdiv(group * T, BLOCK_M)
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS % tiles
    key_plane = tl.cast(tl.program_id(0) // (SPLITS * tiles), tl.int64)
    K = H // group
    b = key_plane // K
    key_head = key_plane % K
    length = tl.load(lengths + b).to(tl.int32)
    tl.device_assert((length >= 0) & (length + T <= M), "attention_decode: a cache row is full")

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # T rows of the first query head, then the next
    valid = rows < group * T
    h = key_head * group + rows // T
    t = rows % T
    dims = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (dims[None, :] < D)
    start_q = b * stride_qb + h * stride_qh + tl.cast(t, tl.int64) * stride_qt
    queries = tl.load(q + start_q[:, None] + dims[None, :], mask=inside, other=0.0)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + h, mask=valid, other=0.0)[:, None]

    first = 0 * length
    if window is not None:
        first = tl.maximum(length + 1 - window, 0)
    part = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    start = first + split * part
    stop = tl.minimum(start + part, length)
    full_stop = start
    if window is None:
        full_stop = start + tl.maximum(stop - start, 0) // BLOCK_N * BLOCK_N
    cache_k += b * stride_ckb + key_head * stride_ckh
    cache_v += b * stride_cvb + key_head * stride_cvh
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    index = (length + t)[:, None]
    if window is None:
        acc, total, top = attend(
            acc, total, top, queries, cache_k, cache_v, stride_ckt, stride_cvt,
            start, full_stop, length, index, index, index * 0, slope, None, None, None,
            None, 0, 0, scale, cap, window, False, FOLD, False, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, queries, cache_k, cache_v, stride_ckt, stride_cvt,
        full_stop, stop, length, index, index, index * 0, slope, None, None, None,
        None, 0, 0, scale, cap, window, False, FOLD, True, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    if split == SPLITS - 1:
        k += b * stride_kb + key_head * stride_kh
        v += b * stride_vb + key_head * stride_vh
        index = t[:, None]
        acc, total, top = attend(
            acc, total, top, queries, k, v, stride_kt, stride_vt,
            0, T, T, index, index, index * 0, slope, None, None, None,
            None, 0, 0, scale, cap, window, True, FOLD, True, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        if tile == 0:
            for n in tl.range(0, T, BLOCK_N):
                new = n + tl.arange(0, BLOCK_N)[:, None]
                fits = (new < T) & (length >= 0) & (length + new < M) & (dims[None, :] < D)
                place = tl.cast(length + new, tl.int64)
                keys = load_block(k, n, stride_kt, T, BLOCK_N, D, BLOCK_D, True)
                tl.store(cache_k + place * stride_ckt + dims[None, :], keys, mask=fits)
                values = load_block(v, n, stride_vt, T, BLOCK_N, D, BLOCK_D, True)
                tl.store(cache_v + place * stride_cvt + dims[None, :], values, mask=fits)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    place = (b * H + h) * T + t
    if SPLITS > 1:
        place += tl.cast(split, tl.int64) * B * H * T
        tl.store(lse2 + place, tl.where(empty, float("-inf"), top + tl.log2(total)), mask=valid)
    place = out + place[:, None] * D + dims[None, :]
    tl.store(place, cast(acc, out.dtype.element_ty), mask=inside)


@jit
def attention_decode_join_kernel(
    parts: tl.tensor,  # (SPLITS, N, D) fp32, N = B * H * T
    lse2: tl.tensor,  # (SPLITS, N) fp32
    out: tl.tensor,  # (N, D)
    N: tl.tensor,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Weigh the parts of one query by what each of them summed."""
    row = tl.cast(tl.program_id(0), tl.int64)
    split = tl.cast(tl.arange(0, SPLITS), tl.int64)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(lse2 + split * N + row)
    weights = tl.exp2(lse - tl.max(lse, 0))
    weights = weights / tl.sum(weights, 0)
    place = ((split * N + row) * D)[:, None] + dims[None, :]
    part = tl.load(parts + place, mask=dims[None, :] < D, other=0.0)
    joined = tl.sum(part * weights[:, None], 0)
    tl.store(out + row * D + dims, cast(joined, out.dtype.element_ty), mask=dims < D)


def splits_of(programs: int, M: int, BLOCK_N: int, sms: int) -> int:
    """Into how many parts a cache of M tokens is cut: a power of two that fills the chip."""
    wanted = triton.cdiv(2 * sms, programs)
    useful = triton.cdiv(M, 2 * BLOCK_N)  # a part shorter than two blocks is not worth joining
    return min(MAX_SPLITS, int(triton.next_power_of_2(max(1, min(wanted, useful)))))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    lengths: Tensor,
    alibi_slopes: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """gptopt::attention_decode: out (B, H, T, D); the caches are written in place."""
    B, H, T, D = q.shape
    K, M = cache_k.shape[1:3]
    out = torch.empty((B, H, T, D), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if INTERPRETED and int((lengths + T).max()) > M:
        raise IndexError(f"attention_decode: lengths + {T} new tokens exceed the cache of {M}")
    q, k, v = head_rows(q), head_rows(k), head_rows(v)
    masks = Masks(None, None, window, alibi_slopes, softcap, scale, M)
    where = arch(q.device)
    rows = H // K * T
    config = choose("attention.decode", where, q.dtype, shape_class(D, masks.extra))
    tiles = triton.cdiv(rows, config.sizes["BLOCK_M"])
    splits = splits_of(B * K * tiles, M, config.sizes["BLOCK_N"], sm_count(q.device))
    result, lse2 = out, None
    if splits > 1:
        result = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        lse2 = torch.empty((splits, B, H, T), dtype=torch.float32, device=q.device)
    launch(
        attention_decode_kernel,
        (B * K * tiles * splits,),
        q,
        *(q, k, v, cache_k, cache_v, lengths.contiguous(), result, lse2, masks.slopes),
        *(n for x in (q, k, v, cache_k, cache_v) for n in x.stride()[:3]),
        *(B, H, H // K, T, M, masks.scale, masks.cap, masks.window),
        SPLITS=splits,
        FOLD=softcap is None and alibi_slopes is None and scale > 0.0,
        D=D,
        BLOCK_D=padded_dim(D),
        **config.options,
        **_ASSERTING,
    )
    if lse2 is not None:
        join = choose("attention.decode_join", where, q.dtype, shape_class(D))
        launch(
            attention_decode_join_kernel,
            (B * H * T,),
            q,
            *(result, lse2, out, B * H * T),
            SPLITS=splits,
            D=D,
            BLOCK_D=padded_dim(D),
            **join.options,
        )
    return out
