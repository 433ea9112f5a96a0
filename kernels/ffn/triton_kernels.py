"""ffn on the GPU, the device side: the activations, the forward and both forms of the backward."""

from typing import Any

import triton.language as tl

from gptopt.kernels.launch import cast, dot_operand, jit

_LOG2E = tl.constexpr(1.4426950408889634)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TANH_CUBE = tl.constexpr(0.044715)


@jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    # Of the size alone: exp2 of a large number would be infinite.
    small = tl.exp2(tl.abs(x) * -_LOG2E)
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@jit
def _normal(x: tl.tensor) -> tl.tensor:
    """The normal distribution up to x, by erf (Abramowitz and Stegun 1964, 7.1.26: 1.5e-7, the
    rounding of float32), and its density: one exp2 for both."""
    z = tl.abs(x) * _SQRT_HALF
    bell = tl.exp2(z * z * -_LOG2E)
    t = 1.0 / (1.0 + 0.3275911 * z)
    tail = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    tail = 0.254829592 + t * (-0.284496736 + t * tail)
    tail *= 0.5 * t * bell
    return tl.where(x < 0.0, tail, 1.0 - tail), bell * _NORMAL


@jit
def _activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == "relu":
        y = tl.where(x <= 0.0, 0.0, x)  # a NaN stays one
    elif ACTIVATION == "relu2":
        y = tl.where(x <= 0.0, 0.0, x)
        y = y * y
    elif ACTIVATION == "gelu_tanh":
        y = x * _sigmoid(x * _TANH_SCALE * (1.0 + x * x * _TANH_CUBE))
    elif ACTIVATION == "swiglu":
        y = x * _sigmoid(x)
    else:  # gelu, geglu
        share, _ = _normal(x)
        y = x * share
    return y


@jit
def _derivative(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        d = tl.where(x <= 0.0, 0.0, 2.0 * x)
    elif ACTIVATION == "gelu_tanh":
        s = _sigmoid(x * _TANH_SCALE * (1.0 + x * x * _TANH_CUBE))
        d = s + x * s * (1.0 - s) * _TANH_SCALE * (1.0 + x * x * (3.0 * _TANH_CUBE))
    elif ACTIVATION == "swiglu":
        s = _sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    else:
        share, density = _normal(x)
        d = share + x * density
    return d


@jit
def tile_of(rows: tl.tensor, columns: tl.tensor, GROUP: tl.constexpr) -> Any:
    """(row, column) of this program's tile. Tiles go down GROUP rows before the next column: those
    that run at the same time share their operands in the L2 cache."""
    tile = tl.program_id(0)
    in_group = GROUP * columns
    first = tile // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@jit
def ffn_fwd_kernel(
    x_ptr: tl.tensor,  # (M, C), rows x_stride apart
    weight_ptr: tl.tensor,  # (F, C), rows weight_stride apart
    bias_ptr: tl.tensor,  # (F,) or None
    gate_weight_ptr: tl.tensor,  # (F, C), rows gate_stride apart; None without a gate
    gate_bias_ptr: tl.tensor,  # (F,) or None
    addend_ptr: tl.tensor,  # (M, F), rows addend_stride apart; or None
    out_ptr: tl.tensor,  # (M, F), or None
    hidden_ptr: tl.tensor,  # (M, F), what goes into the activation; or None
    gate_ptr: tl.tensor,  # (M, F), what multiplies it; or None
    M: tl.tensor,
    F: tl.tensor,
    C: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    gate_stride: tl.tensor,
    addend_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK_C: tl.constexpr,  # BLOCK_C does not divide C
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One tile of the result."""
    tile_m, tile_f = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(F, BLOCK_F), GROUP_M)
    m0 = tile_m * BLOCK_M
    f0 = tile_f * BLOCK_F
    m = m0 + tl.arange(0, BLOCK_M)
    f = f0 + tl.arange(0, BLOCK_F)
    c = tl.arange(0, BLOCK_C)

    # Rows beyond the end read row 0, so that only the last block of channels may need a mask.
    m_read = tl.where(m < M, m, 0).to(tl.int64)
    f_read = tl.where(f < F, f, 0).to(tl.int64)
    x_ptrs = x_ptr + m_read[:, None] * x_stride + c[None, :]
    weight_ptrs = weight_ptr + f_read[None, :] * weight_stride + c[:, None]
    hidden = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    if gate_weight_ptr is not None:
        gate_ptrs = gate_weight_ptr + f_read[None, :] * gate_stride + c[:, None]
        gate = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        if MASK_C:
            x = tl.load(x_ptrs, mask=c[None, :] < C - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=c[:, None] < C - start, other=0.0)
        else:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        x = dot_operand(x)
        hidden = tl.dot(x, dot_operand(weight), hidden, input_precision=PRECISION)
        if gate_weight_ptr is not None:
            if MASK_C:
                gate_weight = tl.load(gate_ptrs, mask=c[:, None] < C - start, other=0.0)
            else:
                gate_weight = tl.load(gate_ptrs)
            gate = tl.dot(x, dot_operand(gate_weight), gate, input_precision=PRECISION)
            gate_ptrs += BLOCK_C
        x_ptrs += BLOCK_C
        weight_ptrs += BLOCK_C

    inside = (m < M)[:, None] & (f < F)[None, :]
    # 64 bits for where the tile begins, fewer registers for the places within it.
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_F)[None, :]
    corner = m0.to(tl.int64) * F + f0
    at = row * F + column
    dtype = x_ptr.dtype.element_ty
    if bias_ptr is not None:
        hidden += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    if addend_ptr is not None:
        addend_ptr += m0.to(tl.int64) * addend_stride + f0
        addend = tl.load(addend_ptr + (row * addend_stride + column), mask=inside, other=0.0)
        hidden += addend.to(tl.float32)
    if hidden_ptr is not None:
        tl.store(hidden_ptr + corner + at, cast(hidden, dtype), mask=inside)
    out = _activate(hidden, ACTIVATION)
    if gate_weight_ptr is not None:
        if gate_bias_ptr is not None:
            gate += tl.load(gate_bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        if gate_ptr is not None:
            tl.store(gate_ptr + corner + at, cast(gate, dtype), mask=inside)
        out *= gate
    if out_ptr is not None:
        tl.store(out_ptr + corner + at, cast(out, dtype), mask=inside)


@jit
def ffn_bwd_act_kernel(
    grad_ptr: tl.tensor,  # (M, F), rows grad_stride apart
    hidden_ptr: tl.tensor,  # (M, F)
    gate_ptr: tl.tensor,  # (M, F), None without a gate
    dhidden_ptr: tl.tensor,  # (M, F), or None
    dgate_ptr: tl.tensor,  # (M, F), or None
    dbias_ptr: tl.tensor,  # (slabs, F) float32, the sums over each slab's rows; or None
    dgate_bias_ptr: tl.tensor,  # the same of the gate; or None
    M: tl.tensor,
    F: tl.tensor,
    grad_stride: tl.tensor,
    slab_rows: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """BLOCK_F columns of one slab of rows."""
    blocks = tl.cdiv(F, BLOCK_F)
    slab = tl.program_id(0) // blocks
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    sums = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    gate_sums = tl.zeros([BLOCK_M, BLOCK_F], dtype=tl.float32)
    dtype = hidden_ptr.dtype.element_ty
    for start in range(slab * slab_rows, tl.minimum((slab + 1) * slab_rows, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & (f < F)[None, :]
        m = m.to(tl.int64)[:, None]
        at = m * F + f[None, :]
        grad = tl.load(grad_ptr + m * grad_stride + f[None, :], mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            if dgate_ptr is not None or dgate_bias_ptr is not None:
                dgate = grad * _activate(hidden, ACTIVATION)
                gate_sums += dgate
                if dgate_ptr is not None:
                    tl.store(dgate_ptr + at, cast(dgate, dtype), mask=inside)
            grad *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dhidden = grad * _derivative(hidden, ACTIVATION)
        sums += dhidden
        if dhidden_ptr is not None:
            tl.store(dhidden_ptr + at, cast(dhidden, dtype), mask=inside)
    at = slab.to(tl.int64) * F + f
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(sums, axis=0), mask=f < F)
    if dgate_bias_ptr is not None:
        tl.store(dgate_bias_ptr + at, tl.sum(gate_sums, axis=0), mask=f < F)


@jit
def ffn_bwd_dx_kernel(
    grad_ptr: tl.tensor,  # (M, F), rows grad_stride apart
    hidden_ptr: tl.tensor,  # (M, F)
    gate_ptr: tl.tensor,  # (M, F), None without a gate
    weight_ptr: tl.tensor,  # (F, C), rows weight_stride apart
    gate_weight_ptr: tl.tensor,  # (F, C), rows gate_stride apart; None without a gate
    dx_ptr: tl.tensor,  # (M, C)
    dhidden_ptr: tl.tensor,  # (M, F), or None
    dgate_ptr: tl.tensor,  # (M, F), or None
    dbias_ptr: tl.tensor,  # (tiles of rows, F) float32, the sums over each tile's rows; or None
    dgate_bias_ptr: tl.tensor,  # the same of the gate; or None
    M: tl.tensor,
    F: tl.tensor,
    C: tl.tensor,
    grad_stride: tl.tensor,
    weight_stride: tl.tensor,
    gate_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,  # BLOCK_F does not divide F, or BLOCK_C not C
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One tile of dx = dhidden W + dgate Wg, where both factors on the left are found as they are
    needed. Every tile of a row finds them; the first one keeps them and their sums."""
    tile_m, tile_c = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C), GROUP_M)
    m0 = tile_m * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    f = tl.arange(0, BLOCK_F)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    row, column = tl.arange(0, BLOCK_M)[:, None], f[None, :]
    inside = (m < M)[:, None]
    dtype = hidden_ptr.dtype.element_ty

    # Rows beyond the end read the last one: the loads need no mask for them.
    read = tl.minimum(m, M - 1).to(tl.int64)[:, None]
    grad_ptr += read * grad_stride + column
    hidden_ptr += read * F + column
    weight_ptr += f.to(tl.int64)[:, None] * weight_stride + c[None, :]
    at = m0.to(tl.int64) * F
    sums_at = tile_m.to(tl.int64) * F + f
    if gate_ptr is not None:
        gate_ptr += read * F + column
        gate_weight_ptr += f.to(tl.int64)[:, None] * gate_stride + c[None, :]
    dx = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        here = f < F - start
        if MASK:
            # Zeros, so that whatever the weights' tail holds is no part of the sum.
            grad = tl.load(grad_ptr + start, mask=here[None, :], other=0.0)
            hidden = tl.load(hidden_ptr + start, mask=here[None, :], other=0.0)
            whole = here[:, None] & (c < C)[None, :]
            weight = tl.load(weight_ptr, mask=whole, other=0.0)
        else:
            grad = tl.load(grad_ptr + start)
            hidden = tl.load(hidden_ptr + start)
            weight = tl.load(weight_ptr)
        grad = grad.to(tl.float32)
        hidden = hidden.to(tl.float32)
        if gate_ptr is not None:
            if MASK:
                gate = tl.load(gate_ptr + start, mask=here[None, :], other=0.0)
                gate_weight = tl.load(gate_weight_ptr, mask=whole, other=0.0)
            else:
                gate = tl.load(gate_ptr + start)
                gate_weight = tl.load(gate_weight_ptr)
            dgate = grad * _activate(hidden, ACTIVATION)
            rounded = cast(dgate, dtype)
            dx = tl.dot(
                dot_operand(rounded), dot_operand(gate_weight), dx, input_precision=PRECISION
            )
            if tile_c == 0:
                if dgate_ptr is not None:
                    place = dgate_ptr + at + start + (row * F + column)
                    tl.store(place, rounded, mask=inside & here[None, :])
                if dgate_bias_ptr is not None:
                    sums = tl.sum(tl.where(inside, dgate, 0.0), axis=0)
                    tl.store(dgate_bias_ptr + sums_at + start, sums, mask=here)
            grad *= gate.to(tl.float32)
            gate_weight_ptr += BLOCK_F * gate_stride
        dhidden = grad * _derivative(hidden, ACTIVATION)
        rounded = cast(dhidden, dtype)
        dx = tl.dot(dot_operand(rounded), dot_operand(weight), dx, input_precision=PRECISION)
        if tile_c == 0:
            if dhidden_ptr is not None:
                place = dhidden_ptr + at + start + (row * F + column)
                tl.store(place, rounded, mask=inside & here[None, :])
            if dbias_ptr is not None:
                sums = tl.sum(tl.where(inside, dhidden, 0.0), axis=0)
                tl.store(dbias_ptr + sums_at + start, sums, mask=here)
        weight_ptr += BLOCK_F * weight_stride

    place = dx_ptr + m0.to(tl.int64) * C + tile_c * BLOCK_C
    place += row * C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(place, cast(dx, dx_ptr.dtype.element_ty), mask=inside & (c < C)[None, :])
