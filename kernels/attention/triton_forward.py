"""Attention forward in Triton: one pass over the keys with a running softmax, no score stored.

Source: Dao 2023, arXiv:2307.08691, algorithm 1.
"""

from math import log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptopt.kernels.attention.triton_scores import (
    Masks,
    documents,
    head_rows,
    key_range,
    key_sees,
    load_block,
    log2_scores,
    padded_dim,
    positions,
    shape_class,
    visible,
)
from gptopt.kernels.launch import (
    arch,
    cast,
    choose,
    dot_operand,
    dropout_threshold,
    jit,
    keep_mask,
    launch,
)

_LN2 = tl.constexpr(log(2.0))


@jit
def attend(
    acc: tl.tensor,
    total: tl.tensor,
    top: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    stride_k: tl.tensor,
    stride_v: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    end: tl.tensor,
    q_index: tl.tensor,
    q_position: tl.tensor,
    q_document: tl.tensor,
    slope: tl.tensor,
    key_mask: tl.tensor,
    doc_ids: tl.tensor,
    position: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    plane: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    FOLD: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Let the queries see keys start .. stop - 1, from `end` on none.

    acc (BLOCK_M, BLOCK_D), total and top (BLOCK_M,): sum of p v, sum of p, largest score so far,
    fp32. q (BLOCK_M, BLOCK_D); q_index, q_position, q_document (BLOCK_M, 1); slope: a scalar or
    (BLOCK_M, 1). k and v point to the head's key 0. FOLD: scores are products times a positive
    scale and nothing else, so the scale goes into the subtraction of the largest.
    """
    for n in tl.range(start, stop, BLOCK_N):
        k_index = n + tl.arange(0, BLOCK_N)[None, :]
        keys = load_block(k, n, stride_k, end, BLOCK_N, D, BLOCK_D, MASKED)
        products = tl.dot(dot_operand(q), tl.trans(dot_operand(keys)), input_precision="ieee")
        k_position = positions(position, k_index, k_index < end)
        scores = products
        if not FOLD:
            scores = log2_scores(products, scale, cap, slope, q_position, k_position)
        if MASKED:
            real = key_sees(key_mask, k_index, end)
            k_document = documents(doc_ids, k_index, k_index < end)
            see = visible(
                real, q_index, k_index, q_position, k_position, q_document, k_document, window,
                CAUSAL,
            )  # fmt: skip
            scores = tl.where(see, scores, float("-inf"))
        highest = tl.max(scores, 1)
        if FOLD:
            highest = highest * scale
        new_top = tl.maximum(top, highest)
        shift = new_top
        if MASKED:  # a row that has seen nothing yet: any finite shift gives it zeros
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        if FOLD:
            p = tl.exp2(scores * scale - shift[:, None])
        else:
            p = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        top = new_top
        if seed is not None:
            keep = keep_mask(seed, k_index + q_index * 0, q_index, plane, threshold)
            p = tl.where(keep, p, 0.0)
        values = load_block(v, n, stride_v, end, BLOCK_N, D, BLOCK_D, MASKED)
        p = dot_operand(cast(p, values.dtype))
        acc = tl.dot(p, dot_operand(values), acc, input_precision="ieee")
    return acc, total, top


@jit
def attention_fwd_kernel(
    q: tl.tensor,  # (B, H, T, D)
    k: tl.tensor,  # (B, K, S, D)
    v: tl.tensor,  # (B, K, S, D)
    out: tl.tensor,  # (B, H, T, D), contiguous
    lse: tl.tensor,  # (B, H, T) fp32, contiguous
    key_mask: tl.tensor,  # (B, S) uint8 or None
    doc_ids: tl.tensor,  # (B, S) integer or None
    position: tl.tensor,  # (B, S) int32 or None
    slopes: tl.tensor,  # (H,) fp32, times log2(e), or None
    bounds: tl.tensor,  # (B, blocks, 4) int32 or None
    seed: tl.tensor,  # () int64 or None
    stride_qb: tl.tensor,
    stride_qh: tl.tensor,
    stride_qt: tl.tensor,
    stride_kb: tl.tensor,
    stride_kh: tl.tensor,
    stride_kt: tl.tensor,
    stride_vb: tl.tensor,
    stride_vh: tl.tensor,
    stride_vt: tl.tensor,
    H: tl.tensor,
    group: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    CAUSAL: tl.constexpr,
    FOLD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One block of queries of one head per program, the longest rows of a causal call first."""
    blocks = tl.cdiv(T, BLOCK_M)
    plane = tl.program_id(0) // blocks  # b * H + h
    block = blocks - 1 - tl.program_id(0) % blocks
    b = tl.cast(plane // H, tl.int64)
    h = plane % H
    q += b * stride_qb + tl.cast(h, tl.int64) * stride_qh
    k += b * stride_kb + tl.cast(h // group, tl.int64) * stride_kh
    v += b * stride_vb + tl.cast(h // group, tl.int64) * stride_vh
    if key_mask is not None:
        key_mask += b * S
    if doc_ids is not None:
        doc_ids += b * S
    if position is not None:
        position += b * S
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + h)

    m = block * BLOCK_M
    rows = m + tl.arange(0, BLOCK_M)
    q_index = (S - T + rows)[:, None]
    q_position = positions(position, q_index, q_index < S)
    q_document = documents(doc_ids, q_index, q_index < S)
    queries = load_block(q, m, stride_qt, T, BLOCK_M, D, BLOCK_D, True)
    start, stop, full_start, full_stop = key_range(
        bounds, block, blocks, b, S - T + m, S, window, CAUSAL, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if bounds is not None or window is not None:
        acc, total, top = attend(
            acc, total, top, queries, k, v, stride_kt, stride_vt, start, full_start, S,
            q_index, q_position, q_document, slope, key_mask, doc_ids, position,
            seed, threshold, plane, scale, cap, window,
            CAUSAL, FOLD, True, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, queries, k, v, stride_kt, stride_vt, full_start, full_stop, S,
        q_index, q_position, q_document, slope, key_mask, doc_ids, position,
        seed, threshold, plane, scale, cap, window,
        CAUSAL, FOLD, False, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, queries, k, v, stride_kt, stride_vt, full_stop, stop, S,
        q_index, q_position, q_document, slope, key_mask, doc_ids, position,
        seed, threshold, plane, scale, cap, window,
        CAUSAL, FOLD, True, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc * (keep_scale / total)[:, None]
    log_sum = tl.where(empty, float("-inf"), (top + tl.log2(total)) * _LN2)
    tl.store(lse + tl.cast(plane, tl.int64) * T + rows, log_sum, mask=rows < T)
    dims = tl.arange(0, BLOCK_D)
    out += (tl.cast(plane, tl.int64) * T + m) * D
    place = out + (tl.arange(0, BLOCK_M)[:, None] * D + dims[None, :])
    inside = (rows[:, None] < T) & (dims[None, :] < D)
    tl.store(place, cast(acc, out.dtype.element_ty), mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    key_mask: Tensor | None,
    doc_ids: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gptopt::attention: (out, present_k, present_v, lse), the presents empty without a past."""
    B, H, T, D = q.shape
    present_k, present_v = k.new_empty(0), v.new_empty(0)
    if past_k is not None and past_v is not None:
        k = present_k = torch.cat((past_k, k), dim=2)
        v = present_v = torch.cat((past_v, v), dim=2)
    out = torch.empty((B, H, T, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    S = k.shape[2]
    if lse.numel() == 0:
        return out, present_k, present_v, lse
    q, k, v = head_rows(q), head_rows(k), head_rows(v)
    masks = Masks(key_mask, doc_ids, window, alibi_slopes, softcap, scale, S)
    kind = shape_class(D, "rich" if dropout_p > 0.0 else masks.extra)
    config = choose("attention.fwd", arch(q.device), q.dtype, kind)
    BLOCK_M, BLOCK_N = config.sizes["BLOCK_M"], config.sizes["BLOCK_N"]
    launch(
        attention_fwd_kernel,
        (B * H * triton.cdiv(T, BLOCK_M),),
        q,
        q,
        k,
        v,
        out,
        lse,
        masks.key_mask,
        masks.doc_ids,
        masks.position,
        masks.slopes,
        masks.bounds(q, T, S, causal, BLOCK_M, BLOCK_N, by_key=False),
        seed if dropout_p > 0.0 else None,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        H,
        H // k.shape[1],
        T,
        S,
        masks.scale,
        masks.cap,
        masks.window,
        dropout_threshold(dropout_p),
        1.0 / (1.0 - dropout_p),
        CAUSAL=causal,
        FOLD=softcap is None and alibi_slopes is None and scale > 0.0,
        D=D,
        BLOCK_D=padded_dim(D),
        **config.options,
    )
    return out, present_k, present_v, lse
