"""Attention backward in Triton, in two forms: what is launched, and the sums of each row.

Fast: one pass over the keys, five matrix products, dQ added up in memory by atomics, so that its
last bits change from run to run. Repeatable: dQ in a pass of its own, seven products, the same bits
every time; it runs while `torch.are_deterministic_algorithms_enabled()`.

Source: Dao 2023, arXiv:2307.08691, algorithm 2.
"""

from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptopt.kernels.attention.triton_gradients import attention_bwd_dkdv_kernel
from gptopt.kernels.attention.triton_query_gradients import attention_bwd_dq_kernel
from gptopt.kernels.attention.triton_scores import (
    LOG2E,
    Masks,
    head_rows,
    load_block,
    padded_dim,
    shape_class,
)
from gptopt.kernels.launch import arch, choose, dropout_threshold, jit, launch

_LOG2E = tl.constexpr(LOG2E)
_INF = tl.constexpr(inf)


@jit
def attention_bwd_delta_kernel(
    grad_out: tl.tensor,  # (B, H, T, D)
    out: tl.tensor,  # (B, H, T, D), contiguous
    lse: tl.tensor,  # (B, H, T) fp32, contiguous
    grad_lse: tl.tensor,  # (B, H, T) fp32, contiguous, or None
    delta: tl.tensor,  # (B, H, T) fp32: sum(grad_out * out) - grad_lse
    lse2: tl.tensor,  # (B, H, T) fp32: lse in the log2 domain, +inf where a row saw no key
    dq: tl.tensor,  # (B, H, T, D) fp32, contiguous, to be set to 0; or None
    stride_gb: tl.tensor,
    stride_gh: tl.tensor,
    stride_gt: tl.tensor,
    H: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """What one row of scores needs to know of the rest of the row."""
    blocks = tl.cdiv(T, BLOCK_M)
    plane = tl.cast(tl.program_id(0) // blocks, tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M
    grad_out += plane // H * stride_gb + plane % H * stride_gh
    g = load_block(grad_out, m, stride_gt, T, BLOCK_M, D, BLOCK_D, True)
    o = load_block(out + plane * T * D, m, D, T, BLOCK_M, D, BLOCK_D, True)
    total = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    rows = plane * T + m + tl.arange(0, BLOCK_M)
    inside = m + tl.arange(0, BLOCK_M) < T
    log_sum = tl.load(lse + rows, mask=inside, other=0.0)
    empty = log_sum == float("-inf")
    if grad_lse is not None:
        total -= tl.load(grad_lse + rows, mask=inside, other=0.0)
    tl.store(delta + rows, tl.where(empty, 0.0, total), mask=inside)
    tl.store(lse2 + rows, tl.where(empty, _INF, log_sum * _LOG2E), mask=inside)
    if dq is not None:
        dims = tl.arange(0, BLOCK_D)[None, :]
        place = dq + (plane * T + m) * D + (tl.arange(0, BLOCK_M)[:, None] * D + dims)
        zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        tl.store(place, zeros, mask=inside[:, None] & (dims < D))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    doc_ids: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """gptopt::attention_backward: (dq, dkeys, dvalues), contiguous."""
    B, H, T, D = q.shape
    K, S = keys.shape[1:3]
    # Asked here, while the operator runs: torch.compile would take the answer for a constant.
    fast = not torch.are_deterministic_algorithms_enabled()
    dq = torch.empty(q.shape, dtype=torch.float32 if fast else q.dtype, device=q.device)
    dk = torch.empty(keys.shape, dtype=q.dtype, device=q.device)
    dv = torch.empty(keys.shape, dtype=q.dtype, device=q.device)
    if lse.numel() == 0:
        return dq.to(q.dtype), dk.zero_(), dv.zero_()
    q, k, v, grad_out = head_rows(q), head_rows(keys), head_rows(values), head_rows(grad_out)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    where, dim = arch(q.device), padded_dim(D)

    config = choose("attention.bwd_delta", where, q.dtype, shape_class(D))
    launch(
        attention_bwd_delta_kernel,
        (B * H * triton.cdiv(T, config.sizes["BLOCK_M"]),),
        q,
        grad_out,
        out.contiguous(),
        lse.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
        delta,
        lse2,
        dq if fast else None,
        *grad_out.stride()[:3],
        H,
        T,
        D=D,
        BLOCK_D=dim,
        **config.options,
    )
    masks = Masks(key_mask, doc_ids, window, alibi_slopes, softcap, scale, S)
    kind = shape_class(D, "rich" if dropout_p > 0.0 else masks.extra)
    seen = (masks.key_mask, masks.doc_ids, masks.position, masks.slopes)
    strides = [n for x in (q, k, v, grad_out) for n in x.stride()[:3]]
    options = (
        *(H, H // K, T, S, masks.scale, masks.cap, masks.window),
        *(dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p), scale, causal, D, dim),
    )
    seed = seed if dropout_p > 0.0 else None

    config = choose("attention.bwd_fast" if fast else "attention.bwd_dkdv", where, q.dtype, kind)
    M, N = config.sizes["BLOCK_M"], config.sizes["BLOCK_N"]
    bounds = masks.bounds(q, T, S, causal, N, M, by_key=True)
    grid = (B * K * triton.cdiv(S, N),)
    pointers = (q, k, v, grad_out, lse2, delta, dk, dv, dq if fast else None, *seen, bounds, seed)
    launch(attention_bwd_dkdv_kernel, grid, q, *pointers, *strides, *options, **config.options)
    if fast:
        return dq.to(q.dtype), dk, dv

    config = choose("attention.bwd_dq", where, q.dtype, kind)
    M, N = config.sizes["BLOCK_M"], config.sizes["BLOCK_N"]
    bounds = masks.bounds(q, T, S, causal, M, N, by_key=False)
    grid = (B * H * triton.cdiv(T, M),)
    arrays = (q, k, v, grad_out, lse2, delta, dq, *seen, bounds, seed)
    launch(attention_bwd_dq_kernel, grid, q, *arrays, *strides, *options, **config.options)
    return dq, dk, dv
