"""The device code of layernorm: one read of each row, statistics in registers.

Forward, a program takes a few rows, whole: dropout, residual sum, statistics, norm. Backward, as
many programs as the chip holds walk over all rows; each finds the statistics again, writes the
rows' gradient, and keeps its own sums for weight and bias, which a second kernel adds up in a
fixed order. No atomics: the same input gives the same bits.
"""

from typing import Any

import triton.language as tl

from gptopt.kernels.launch import cast, jit, keep_linear


@jit
def _rows(
    ptr: tl.tensor, rows: tl.tensor, stride: tl.tensor, DENSE: tl.constexpr, C: tl.constexpr
) -> Any:
    """Pointers to each row's first element; a dense tensor's stride is known when compiling."""
    if DENSE:
        start = ptr + rows * C
    else:
        start = ptr + rows * stride
    return start


@jit
def _centre(
    h: tl.tensor, inside: tl.tensor, C: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr
) -> Any:
    """(h - mean, 0 outside the row; 1 / deviation), for blocks (ROWS, BLOCK_C) and (ROWS, 1)."""
    if not RMS:
        mean = tl.sum(h, axis=1, keep_dims=True) / C
        h = tl.where(inside, h - mean, 0.0)
    variance = tl.sum(h * h, axis=1, keep_dims=True) / C
    return h, 1.0 / tl.sqrt(variance + EPS)


@jit
def layernorm_fwd_kernel(
    x_ptr: tl.tensor,  # (N, C)
    residual_ptr: tl.tensor,  # (N, C) or None
    weight_ptr: tl.tensor,  # (C,) or None
    bias_ptr: tl.tensor,  # (C,) or None
    seed_ptr: tl.tensor,  # () int64 or None
    y_ptr: tl.tensor,  # (N, C)
    h_ptr: tl.tensor,  # (N, C) or None
    n_rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    C: tl.constexpr,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    X_DENSE: tl.constexpr,
    RESIDUAL_DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """y = norm(h), h = dropout(x) + residual; a program per ROWS rows."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    inside = columns < C
    mask = inside & (rows < n_rows)
    x_rows = _rows(x_ptr, rows, x_stride, X_DENSE, C)
    h = tl.load(x_rows + columns, mask=mask, other=0.0).to(WIDE)
    if seed_ptr is not None:
        keep = keep_linear(seed_ptr, rows * C + columns, threshold)
        h = tl.where(keep, h * scale, 0.0)
    if residual_ptr is not None:
        residual_rows = _rows(residual_ptr, rows, residual_stride, RESIDUAL_DENSE, C)
        h += tl.load(residual_rows + columns, mask=mask, other=0.0).to(WIDE)
    if h_ptr is not None:
        # The norm is that of the rounded sum: the backward sees nothing else.
        rounded = cast(h, h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * C + columns, rounded, mask=mask)
        h = rounded.to(WIDE)
    h, rstd = _centre(h, inside, C, EPS, RMS)
    y = h * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(WIDE)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(WIDE)
    tl.store(y_ptr + rows * C + columns, cast(y, y_ptr.dtype.element_ty), mask=mask)


@jit
def layernorm_bwd_kernel(
    grad_y_ptr: tl.tensor,  # (N, C)
    grad_h_ptr: tl.tensor,  # (N, C) or None
    h_ptr: tl.tensor,  # (N, C)
    weight_ptr: tl.tensor,  # (C,) or None
    seed_ptr: tl.tensor,  # () int64 or None
    dx_ptr: tl.tensor,  # (N, C) or None
    dh_ptr: tl.tensor,  # (N, C) or None
    dweight_ptr: tl.tensor,  # (programs, C) or None
    dbias_ptr: tl.tensor,  # (programs, C) or None
    n_rows: tl.tensor,
    grad_y_stride: tl.tensor,
    grad_h_stride: tl.tensor,
    h_stride: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    C: tl.constexpr,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    GRAD_Y_DENSE: tl.constexpr,
    GRAD_H_DENSE: tl.constexpr,
    H_DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """The rows' gradients, and each program's sums for weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)[None, :]
    inside = columns < C
    # Sums stay apart by row to the end: no thread waits for another in the loop.
    dweight = tl.zeros((ROWS, BLOCK_C), dtype=WIDE)
    dbias = tl.zeros((ROWS, BLOCK_C), dtype=WIDE)
    for first in range(program * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS).to(tl.int64))[:, None]
        mask = inside & (rows < n_rows)
        h_at = _rows(h_ptr, rows, h_stride, H_DENSE, C) + columns
        grad_at = _rows(grad_y_ptr, rows, grad_y_stride, GRAD_Y_DENSE, C) + columns
        h = tl.load(h_at, mask=mask, other=0.0).to(WIDE)
        grad = tl.load(grad_at, mask=mask, other=0.0).to(WIDE)
        h, rstd = _centre(h, inside, C, EPS, RMS)
        h *= rstd
        if dweight_ptr is not None:
            dweight += grad * h
        if dbias_ptr is not None:
            dbias += grad
        if weight_ptr is not None:
            # Read again for every row, from the nearest cache: registers are dearer.
            grad *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(WIDE)
        dh = grad - h * (tl.sum(grad * h, axis=1, keep_dims=True) / C)
        if not RMS:
            dh -= tl.sum(grad, axis=1, keep_dims=True) / C
        dh *= rstd
        if grad_h_ptr is not None:
            grad_h_at = _rows(grad_h_ptr, rows, grad_h_stride, GRAD_H_DENSE, C) + columns
            dh += tl.load(grad_h_at, mask=mask, other=0.0).to(WIDE)
        if dh_ptr is not None:
            tl.store(dh_ptr + rows * C + columns, cast(dh, dh_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            keep = keep_linear(seed_ptr, rows * C + columns, threshold)
            dx = tl.where(keep, dh * scale, 0.0)
            tl.store(dx_ptr + rows * C + columns, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        sums = dweight_ptr + program * C + columns
        tl.store(sums, tl.sum(dweight, axis=0, keep_dims=True), mask=inside)
    if dbias_ptr is not None:
        sums = dbias_ptr + program * C + columns
        tl.store(sums, tl.sum(dbias, axis=0, keep_dims=True), mask=inside)


@jit
def layernorm_bwd_wide_kernel(
    grad_y_ptr: tl.tensor,  # (N, C)
    grad_h_ptr: tl.tensor,  # (N, C) or None
    h_ptr: tl.tensor,  # (N, C)
    weight_ptr: tl.tensor,  # (C,) or None
    seed_ptr: tl.tensor,  # () int64 or None
    dx_ptr: tl.tensor,  # (N, C) or None
    dh_ptr: tl.tensor,  # (N, C) or None
    dweight_ptr: tl.tensor,  # (programs, C), zero, or None
    dbias_ptr: tl.tensor,  # (programs, C), zero, or None
    n_rows: tl.tensor,
    grad_y_stride: tl.tensor,
    grad_h_stride: tl.tensor,
    h_stride: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    C: tl.constexpr,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    GRAD_Y_DENSE: tl.constexpr,
    GRAD_H_DENSE: tl.constexpr,
    H_DENSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """`layernorm_bwd_kernel` for rows that registers cannot hold: from memory once, then from the
    nearest cache, block by block; the sums for weight and bias stay in the next one."""
    program = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_C)
    for row in range(program, n_rows, tl.num_programs(0)):
        h_row = _rows(h_ptr, row, h_stride, H_DENSE, C)
        grad_row = _rows(grad_y_ptr, row, grad_y_stride, GRAD_Y_DENSE, C)
        total = tl.zeros((BLOCK_C,), dtype=WIDE)
        if not RMS:
            for start in range(0, C, BLOCK_C):
                columns = start + block
                total += tl.load(h_row + columns, mask=columns < C, other=0.0).to(WIDE)
        mean = tl.sum(total, axis=0) / C
        squares = tl.zeros((BLOCK_C,), dtype=WIDE)
        along = tl.zeros((BLOCK_C,), dtype=WIDE)
        across = tl.zeros((BLOCK_C,), dtype=WIDE)
        for start in range(0, C, BLOCK_C):
            columns = start + block
            inside = columns < C
            h = tl.load(h_row + columns, mask=inside, other=0.0).to(WIDE)
            h = tl.where(inside, h - mean, 0.0)
            grad = tl.load(grad_row + columns, mask=inside, other=0.0).to(WIDE)
            if weight_ptr is not None:
                grad *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(WIDE)
            squares += h * h
            along += grad * h
            across += grad
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / C + EPS)
        slope = tl.sum(along, axis=0) / C * rstd
        shift = 0.0 if RMS else tl.sum(across, axis=0) / C
        for start in range(0, C, BLOCK_C):
            columns = start + block
            inside = columns < C
            h = (tl.load(h_row + columns, mask=inside, other=0.0).to(WIDE) - mean) * rstd
            grad = tl.load(grad_row + columns, mask=inside, other=0.0).to(WIDE)
            if dweight_ptr is not None:
                sums = dweight_ptr + program * C + columns
                tl.store(sums, tl.load(sums, mask=inside) + grad * h, mask=inside)
            if dbias_ptr is not None:
                sums = dbias_ptr + program * C + columns
                tl.store(sums, tl.load(sums, mask=inside) + grad, mask=inside)
            if weight_ptr is not None:
                grad *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(WIDE)
            dh = (grad - h * slope - shift) * rstd
            if grad_h_ptr is not None:
                grad_h_row = _rows(grad_h_ptr, row, grad_h_stride, GRAD_H_DENSE, C)
                dh += tl.load(grad_h_row + columns, mask=inside, other=0.0).to(WIDE)
            at = row * C + columns
            if dh_ptr is not None:
                tl.store(dh_ptr + at, cast(dh, dh_ptr.dtype.element_ty), mask=inside)
            if dx_ptr is not None:
                dx = tl.where(keep_linear(seed_ptr, at, threshold), dh * scale, 0.0)
                tl.store(dx_ptr + at, cast(dx, dx_ptr.dtype.element_ty), mask=inside)
        # The sums that one thread wrote, another may read.
        tl.debug_barrier()


@jit
def layernorm_bwd_sum_kernel(
    partial_ptr: tl.tensor,  # (G, C)
    out_ptr: tl.tensor,  # (C,)
    G: tl.tensor,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """The sum over the programs, in one order whatever the machine does."""
    columns = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    total = tl.zeros((BLOCK_G, BLOCK_C), dtype=WIDE)
    for start in range(0, G, BLOCK_G):
        lines = (start + tl.arange(0, BLOCK_G))[:, None]
        mask = (lines < G) & (columns < C)
        total += tl.load(partial_ptr + lines.to(tl.int64) * C + columns, mask=mask, other=0.0)
    out = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out_ptr + columns, cast(out, out_ptr.dtype.element_ty), mask=columns < C)
