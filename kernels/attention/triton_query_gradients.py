"""Attention's backward by query blocks: dQ alone, as the repeatable form finds it.

Each block of queries has one owner, which sums over its keys in one order: no atomics, the same
bits every time.
"""

from math import inf
from typing import Any

import triton.language as tl

from gptopt.kernels.attention.triton_gradients import score_gradients
from gptopt.kernels.attention.triton_scores import (
    documents,
    key_range,
    key_sees,
    load_block,
    positions,
)
from gptopt.kernels.launch import cast, jit, product

_INF = tl.constexpr(inf)


@jit
def _queries_learn(
    dq: tl.tensor,
    queries: tl.tensor,
    g: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    row_lse2: tl.tensor,
    row_delta: tl.tensor,
    stride_k: tl.tensor,
    stride_v: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    S: tl.tensor,
    q_index: tl.tensor,
    q_position: tl.tensor,
    q_document: tl.tensor,
    slope: tl.tensor,
    key_mask: tl.tensor,
    doc_ids: tl.tensor,
    position: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    plane: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Add to dq (BLOCK_M, BLOCK_D) what keys start .. stop - 1 say."""
    for n in tl.range(start, stop, BLOCK_N):
        k_index = n + tl.arange(0, BLOCK_N)[None, :]
        keys = load_block(k, n, stride_k, S, BLOCK_N, D, BLOCK_D, MASKED)
        products = product(queries, tl.trans(keys), None)
        values = load_block(v, n, stride_v, S, BLOCK_N, D, BLOCK_D, MASKED)
        p_products = product(g, tl.trans(values), None)
        k_position = positions(position, k_index, k_index < S)
        k_document = documents(doc_ids, k_index, k_index < S)
        real = k_index < S
        if MASKED:
            real = key_sees(key_mask, k_index, S)
        _, gradients = score_gradients(
            products, p_products, row_lse2, row_delta, q_index, k_index, q_position, k_position,
            q_document, k_document, real, slope, seed, threshold, keep_scale, plane, scale, cap,
            window, CAUSAL, MASKED,
        )  # fmt: skip
        dq = product(cast(gradients, keys.dtype), keys, dq)
    return dq


@jit
def attention_bwd_dq_kernel(
    q: tl.tensor,  # (B, H, T, D)
    k: tl.tensor,  # (B, K, S, D)
    v: tl.tensor,  # (B, K, S, D)
    grad_out: tl.tensor,  # (B, H, T, D)
    lse2: tl.tensor,  # (B, H, T) fp32, contiguous
    delta: tl.tensor,  # (B, H, T) fp32, contiguous
    dq: tl.tensor,  # (B, H, T, D), contiguous
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
    stride_gb: tl.tensor,
    stride_gh: tl.tensor,
    stride_gt: tl.tensor,
    H: tl.tensor,
    group: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    product_scale: tl.tensor,
    CAUSAL: tl.constexpr,
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
    grad_out += b * stride_gb + tl.cast(h, tl.int64) * stride_gh
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
    rows = m + tl.arange(0, BLOCK_M)[:, None]
    q_index = S - T + rows
    q_position = positions(position, q_index, q_index < S)
    q_document = documents(doc_ids, q_index, q_index < S)
    queries = load_block(q, m, stride_qt, T, BLOCK_M, D, BLOCK_D, True)
    g = load_block(grad_out, m, stride_gt, T, BLOCK_M, D, BLOCK_D, True)
    row_lse2 = tl.load(lse2 + tl.cast(plane, tl.int64) * T + rows, mask=rows < T, other=_INF)
    row_delta = tl.load(delta + tl.cast(plane, tl.int64) * T + rows, mask=rows < T, other=0.0)
    start, stop, full_start, full_stop = key_range(
        bounds, block, blocks, b, S - T + m, S, window, CAUSAL, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if bounds is not None or window is not None:
        acc = _queries_learn(
            acc, queries, g, k, v, row_lse2, row_delta, stride_kt, stride_vt, start, full_start, S,
            q_index, q_position, q_document, slope, key_mask, doc_ids, position, seed, threshold,
            keep_scale, plane, scale, cap, window, CAUSAL, True, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc = _queries_learn(
        acc, queries, g, k, v, row_lse2, row_delta, stride_kt, stride_vt, full_start, full_stop, S,
        q_index, q_position, q_document, slope, key_mask, doc_ids, position, seed, threshold,
        keep_scale, plane, scale, cap, window, CAUSAL, False, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc = _queries_learn(
        acc, queries, g, k, v, row_lse2, row_delta, stride_kt, stride_vt, full_stop, stop, S,
        q_index, q_position, q_document, slope, key_mask, doc_ids, position, seed, threshold,
        keep_scale, plane, scale, cap, window, CAUSAL, True, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    dq += (tl.cast(plane, tl.int64) * T + m) * D
    place = dq + (tl.arange(0, BLOCK_M)[:, None] * D + dims[None, :])
    inside = (rows < T) & (dims[None, :] < D)
    tl.store(place, cast(acc * product_scale, dq.dtype.element_ty), mask=inside)
