"""The two kernels of attention's backward: dK/dV by key blocks, dQ by query blocks.

They recompute the probabilities from the log-sum-exp. Every sum has one owner and one order, so
there are no atomics, also where several query heads share a key head.
"""

from math import inf
from typing import Any

import triton.language as tl

from gptopt.kernels.attention.triton_scores import (
    documents,
    key_range,
    key_sees,
    load_block,
    log2_scores,
    positions,
    query_range,
    tanh,
    visible,
)
from gptopt.kernels.launch import cast, dot_operand, jit, keep_mask

_INF = tl.constexpr(inf)


@jit
def score_gradients(
    products: tl.tensor,
    p_products: tl.tensor,
    lse2: tl.tensor,
    delta: tl.tensor,
    q_index: tl.tensor,
    k_index: tl.tensor,
    q_position: tl.tensor,
    k_position: tl.tensor,
    q_document: tl.tensor,
    k_document: tl.tensor,
    real: tl.tensor,
    slope: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    plane: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
) -> Any:
    """(dropped probabilities, gradients of the scaled products), queries and keys either way round.

    products: q k^T. p_products: grad_out v^T. The vectors broadcast against both.
    """
    scores = log2_scores(products, scale, cap, slope, q_position, k_position)
    p = tl.exp2(scores - lse2)
    if MASKED:
        see = visible(
            real, q_index, k_index, q_position, k_position, q_document, k_document, window, CAUSAL
        )
        p = tl.where(see, p, 0.0)
    dropped = p
    if seed is not None:
        low = k_index + q_index * 0
        keep = keep_mask(seed, low, q_index, plane, threshold)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        p_products = tl.where(keep, p_products * keep_scale, 0.0)
    gradients = p * (p_products - delta)
    if cap is not None:
        squashed = tanh(products * scale)
        gradients = gradients * (1.0 - squashed * squashed)
    return dropped, gradients


@jit
def _keys_learn(
    dk: tl.tensor,
    dv: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    q: tl.tensor,
    grad_out: tl.tensor,
    lse2: tl.tensor,
    delta: tl.tensor,
    stride_q: tl.tensor,
    stride_g: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    k_index: tl.tensor,
    k_position: tl.tensor,
    k_document: tl.tensor,
    real: tl.tensor,
    slope: tl.tensor,
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
    BLOCK_M: tl.constexpr,
) -> Any:
    """Add to dk and dv (BLOCK_N, BLOCK_D) what queries start .. stop - 1 of one head say."""
    for m in tl.range(start, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)[None, :]
        q_index = S - T + rows
        queries = load_block(q, m, stride_q, T, BLOCK_M, D, BLOCK_D, MASKED)
        products = tl.dot(dot_operand(keys), tl.trans(dot_operand(queries)), input_precision="ieee")
        if MASKED:  # exp2(x - inf) = 0: rows behind the last give nothing
            row_lse2 = tl.load(lse2 + rows, mask=rows < T, other=_INF)
            row_delta = tl.load(delta + rows, mask=rows < T, other=0.0)
        else:
            row_lse2 = tl.load(lse2 + rows)
            row_delta = tl.load(delta + rows)
        q_position = positions(position, q_index, q_index < S)
        q_document = documents(doc_ids, q_index, q_index < S)
        g = load_block(grad_out, m, stride_g, T, BLOCK_M, D, BLOCK_D, MASKED)
        p_products = tl.dot(dot_operand(values), tl.trans(dot_operand(g)), input_precision="ieee")
        p, gradients = score_gradients(
            products, p_products, row_lse2, row_delta, q_index, k_index, q_position, k_position,
            q_document, k_document, real, slope, seed, threshold, keep_scale, plane, scale, cap,
            window, CAUSAL, MASKED,
        )  # fmt: skip
        dv = tl.dot(dot_operand(cast(p, g.dtype)), dot_operand(g), dv, input_precision="ieee")
        gradients = dot_operand(cast(gradients, g.dtype))
        dk = tl.dot(gradients, dot_operand(queries), dk, input_precision="ieee")
    return dk, dv


@jit
def attention_bwd_dkdv_kernel(
    q: tl.tensor,  # (B, H, T, D)
    k: tl.tensor,  # (B, K, S, D)
    v: tl.tensor,  # (B, K, S, D)
    grad_out: tl.tensor,  # (B, H, T, D)
    lse2: tl.tensor,  # (B, H, T) fp32, contiguous
    delta: tl.tensor,  # (B, H, T) fp32, contiguous
    dk: tl.tensor,  # (B, K, S, D), contiguous
    dv: tl.tensor,  # (B, K, S, D), contiguous
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
    """One block of keys of one key head per program, over all queries of all its query heads."""
    blocks = tl.cdiv(S, BLOCK_N)
    K = H // group
    key_plane = tl.cast(tl.program_id(0) // blocks, tl.int64)  # b * K + key head
    block = tl.program_id(0) % blocks  # under causal the first blocks have the most to do
    b = key_plane // K
    key_head = key_plane % K
    k += b * stride_kb + key_head * stride_kh
    v += b * stride_vb + key_head * stride_vh
    if key_mask is not None:
        key_mask += b * S
    if doc_ids is not None:
        doc_ids += b * S
    if position is not None:
        position += b * S

    n = block * BLOCK_N
    k_index = (n + tl.arange(0, BLOCK_N))[:, None]
    k_position = positions(position, k_index, k_index < S)
    k_document = documents(doc_ids, k_index, k_index < S)
    real = key_sees(key_mask, k_index, S)
    keys = load_block(k, n, stride_kt, S, BLOCK_N, D, BLOCK_D, True)
    values = load_block(v, n, stride_vt, S, BLOCK_N, D, BLOCK_D, True)
    start, stop, full_start, full_stop = query_range(
        bounds, block, blocks, b, n, T, S, window, CAUSAL, BLOCK_M, BLOCK_N
    )
    dk_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(group):
        h = key_head * group + member
        plane = b * H + h
        head_q = q + b * stride_qb + h * stride_qh
        head_g = grad_out + b * stride_gb + h * stride_gh
        head_lse2 = lse2 + plane * T
        head_delta = delta + plane * T
        plane = tl.cast(plane, tl.int32)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + h)
        if CAUSAL or window is not None or bounds is not None:
            dk_sum, dv_sum = _keys_learn(
                dk_sum, dv_sum, keys, values, head_q, head_g, head_lse2, head_delta, stride_qt,
                stride_gt, start, full_start, T, S, k_index, k_position, k_document, real, slope,
                doc_ids, position, seed, threshold, keep_scale, plane, scale, cap, window,
                CAUSAL, True, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        dk_sum, dv_sum = _keys_learn(
            dk_sum, dv_sum, keys, values, head_q, head_g, head_lse2, head_delta, stride_qt,
            stride_gt, full_start, full_stop, T, S, k_index, k_position, k_document, real, slope,
            doc_ids, position, seed, threshold, keep_scale, plane, scale, cap, window,
            CAUSAL, False, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        dk_sum, dv_sum = _keys_learn(
            dk_sum, dv_sum, keys, values, head_q, head_g, head_lse2, head_delta, stride_qt,
            stride_gt, full_stop, stop, T, S, k_index, k_position, k_document, real, slope,
            doc_ids, position, seed, threshold, keep_scale, plane, scale, cap, window,
            CAUSAL, True, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    place = (key_plane * S + n) * D + (tl.arange(0, BLOCK_N)[:, None] * D + dims[None, :])
    inside = (k_index < S) & (dims[None, :] < D)
    tl.store(dk + place, cast(dk_sum * product_scale, dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, cast(dv_sum, dv.dtype.element_ty), mask=inside)


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
        products = tl.dot(dot_operand(queries), tl.trans(dot_operand(keys)), input_precision="ieee")
        values = load_block(v, n, stride_v, S, BLOCK_N, D, BLOCK_D, MASKED)
        p_products = tl.dot(dot_operand(g), tl.trans(dot_operand(values)), input_precision="ieee")
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
        gradients = dot_operand(cast(gradients, keys.dtype))
        dq = tl.dot(gradients, dot_operand(keys), dq, input_precision="ieee")
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
