"""Attention's backward by key blocks: dK and dV, and in the fast form dQ too.

The probabilities come again from the log-sum-exp. dK and dV have one owner and one order of
summing, also where several query heads share a key head. In the fast form each block of keys adds
its share of dQ to memory: two matrix products less than with a kernel for dQ, in an order that
changes from run to run.
"""

from math import inf
from typing import Any

import triton.language as tl

from gptopt.kernels.attention.triton_scores import (
    documents,
    key_sees,
    load_block,
    log2_scores,
    positions,
    query_range,
    tanh,
    visible,
)
from gptopt.kernels.launch import cast, jit, keep_mask, product

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
def _add_rows(
    base: tl.tensor,
    start: tl.tensor,
    x: tl.tensor,
    end: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    EDGE: tl.constexpr,
) -> None:
    """Add x (ROWS, BLOCK_D) to the rows from `start` in memory, (end, D) contiguous."""
    # In 64 bits the places of a thread differ by constants: none needs a register of its own.
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    place = base + tl.cast(start, tl.int64) * D + rows * D + dims
    if EDGE:
        tl.atomic_add(place, x, mask=(rows < end - start) & (dims < D), sem="relaxed")
    elif D != BLOCK_D:
        tl.atomic_add(place, x, mask=dims < D, sem="relaxed")
    else:
        tl.atomic_add(place, x, sem="relaxed")


@jit
def _keys_learn(
    dk: tl.tensor,
    dv: tl.tensor,
    dq: tl.tensor,
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
    product_scale: tl.tensor,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> Any:
    """Add to dk and dv (BLOCK_N, BLOCK_D) what queries start .. stop - 1 of one head say.

    dq: (T, D), the head's gradients in memory, to add what these keys say; or None.
    """
    for m in tl.range(start, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)[None, :]
        q_index = S - T + rows
        queries = load_block(q, m, stride_q, T, BLOCK_M, D, BLOCK_D, MASKED)
        products = product(keys, tl.trans(queries), None)
        if MASKED:  # exp2(x - inf) = 0: rows behind the last give nothing
            row_lse2 = tl.load(lse2 + rows, mask=rows < T, other=_INF)
            row_delta = tl.load(delta + rows, mask=rows < T, other=0.0)
        else:
            row_lse2 = tl.load(lse2 + rows)
            row_delta = tl.load(delta + rows)
        q_position = positions(position, q_index, q_index < S)
        q_document = documents(doc_ids, q_index, q_index < S)
        g = load_block(grad_out, m, stride_g, T, BLOCK_M, D, BLOCK_D, MASKED)
        p_products = product(values, tl.trans(g), None)
        p, gradients = score_gradients(
            products, p_products, row_lse2, row_delta, q_index, k_index, q_position, k_position,
            q_document, k_document, real, slope, seed, threshold, keep_scale, plane, scale, cap,
            window, CAUSAL, MASKED,
        )  # fmt: skip
        dv = product(cast(p, g.dtype), g, dv)
        gradients = cast(gradients, g.dtype)
        dk = product(gradients, queries, dk)
        if dq is not None:
            share = product(tl.trans(gradients), keys, None) * product_scale
            _add_rows(dq, m, share, T, D, BLOCK_D, BLOCK_M, MASKED)
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
    dq: tl.tensor,  # (B, H, T, D) fp32, contiguous, to be added to; or None
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
        head_dq = None
        if dq is not None:
            head_dq = dq + plane * T * D
        plane = tl.cast(plane, tl.int32)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + h)
        if CAUSAL or window is not None or bounds is not None:
            dk_sum, dv_sum = _keys_learn(
                dk_sum, dv_sum, head_dq, keys, values, head_q, head_g, head_lse2, head_delta,
                stride_qt, stride_gt, start, full_start, T, S, k_index, k_position, k_document,
                real, slope, doc_ids, position, seed, threshold, keep_scale, plane, scale, cap,
                window, product_scale, CAUSAL, True, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        dk_sum, dv_sum = _keys_learn(
            dk_sum, dv_sum, head_dq, keys, values, head_q, head_g, head_lse2, head_delta,
            stride_qt, stride_gt, full_start, full_stop, T, S, k_index, k_position, k_document,
            real, slope, doc_ids, position, seed, threshold, keep_scale, plane, scale, cap,
            window, product_scale, CAUSAL, False, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        dk_sum, dv_sum = _keys_learn(
            dk_sum, dv_sum, head_dq, keys, values, head_q, head_g, head_lse2, head_delta,
            stride_qt, stride_gt, full_stop, stop, T, S, k_index, k_position, k_document,
            real, slope, doc_ids, position, seed, threshold, keep_scale, plane, scale, cap,
            window, product_scale, CAUSAL, True, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    place = (key_plane * S + n) * D + (tl.arange(0, BLOCK_N)[:, None] * D + dims[None, :])
    inside = (k_index < S) & (dims[None, :] < D)
    tl.store(dk + place, cast(dk_sum * product_scale, dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, cast(dv_sum, dv.dtype.element_ty), mask=inside)
