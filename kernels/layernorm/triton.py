"""The Triton bodies of layernorm: what is launched, on which strides, with which blocks."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptopt.kernels.launch import (
    INTERPRETED,
    AotCase,
    Config,
    arch,
    choose,
    dropout_threshold,
    launch,
    pointer,
    sm_count,
)
from gptopt.kernels.layernorm.triton_kernels import (
    layernorm_bwd_kernel,
    layernorm_bwd_sum_kernel,
    layernorm_bwd_wide_kernel,
    layernorm_fwd_kernel,
)
from gptopt.kernels.library import register_triton

MAX_WIDTH = 16384
# Above it a row, its gradients and the sums for weight and bias do not fit in registers together.
MAX_REGISTER_BYTES = 16384


def supports(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
) -> str | None:
    """Why the kernels cannot run on the operator's arguments, or None."""
    if x.shape[-1] > MAX_WIDTH:
        return f"a width of {x.shape[-1]} is above the kernels' {MAX_WIDTH}"
    if dropout_p > 0.0 and x.dtype == torch.float64:
        return "dropout of float64 has no kernel"
    return None


def supports_backward(
    grad_y: Tensor | None, grad_h: Tensor | None, h: Tensor, *arguments: Any
) -> str | None:
    """`supports`, of gptopt::layernorm_backward."""
    weight, bias, seed, kind, eps, dropout_p, _ = arguments
    return supports(h, weight, bias, None, seed, kind, eps, dropout_p)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """gptopt::layernorm."""
    dropped = dropout_p > 0.0
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    h_is_x = residual is None and not dropped
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = torch.empty((0,) if h_is_x else x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y, h
    x = _flat(x)
    residual = None if residual is None else _flat(residual)
    config = _config("fwd", x, dtype)
    N, C = x.shape
    launch(
        layernorm_fwd_kernel,
        (triton.cdiv(N, config.sizes["ROWS"]),),
        x,
        x,
        residual,
        _contiguous(weight),
        _contiguous(bias),
        seed if dropped else None,
        y,
        None if h_is_x else h,
        N,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        dropout_threshold(dropout_p),
        1.0 / (1.0 - dropout_p),
        C=C,
        EPS=eps,
        RMS=kind == "rms",
        X_DENSE=_dense(x),
        RESIDUAL_DENSE=_dense(residual),
        WIDE=_wide(dtype),
        **config.options,
    )
    return y, h


def backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gptopt::layernorm_backward."""
    need_h, need_weight, need_bias = output_mask
    dropped = dropout_p > 0.0
    dh = torch.empty(h.shape if need_h else (0,), dtype=h.dtype, device=h.device)
    dx = torch.empty(h.shape if need_h and dropped else (0,), dtype=h.dtype, device=h.device)
    parameters = (weight if need_weight else None, bias if need_bias else None)
    if h.numel() == 0 or (grad_y is None and grad_h is None):
        dweight, dbias = (h.new_empty(0) if p is None else torch.zeros_like(p) for p in parameters)
        return dx.zero_(), dh.zero_(), dweight, dbias
    flat_h = _flat(h)
    flat_y = _flat(torch.zeros_like(h) if grad_y is None else grad_y)
    flat_grad_h = None if grad_h is None else _flat(grad_h)
    N, C = flat_h.shape
    in_registers = _in_registers(C, h.dtype)
    config = _config("bwd" if in_registers else "bwd_wide", flat_h, h.dtype)
    sizes = config.sizes
    programs = min(triton.cdiv(N, sizes.get("ROWS", 1)), sizes["PER_SM"] * sm_count(h.device))
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    make = torch.empty if in_registers else torch.zeros
    partials = [
        None if p is None else make((programs, C), dtype=wide, device=h.device) for p in parameters
    ]
    launch(
        layernorm_bwd_kernel if in_registers else layernorm_bwd_wide_kernel,
        (programs,),
        h,
        flat_y,
        flat_grad_h,
        flat_h,
        _contiguous(weight),
        seed if dropped else None,
        dx if dx.numel() else None,
        dh if need_h else None,
        *partials,
        N,
        flat_y.stride(0),
        0 if flat_grad_h is None else flat_grad_h.stride(0),
        flat_h.stride(0),
        dropout_threshold(dropout_p),
        1.0 / (1.0 - dropout_p),
        C=C,
        EPS=eps,
        RMS=kind == "rms",
        GRAD_Y_DENSE=_dense(flat_y),
        GRAD_H_DENSE=_dense(flat_grad_h),
        H_DENSE=_dense(flat_h),
        WIDE=_wide(h.dtype),
        **_without_grid(config).options,
    )
    dweight, dbias = (
        h.new_empty(0) if p is None or lines is None else _sum(lines, p)
        for p, lines in zip(parameters, partials, strict=True)
    )
    return dx, dh, dweight, dbias


def _sum(lines: Tensor, like: Tensor) -> Tensor:
    """The sum of `lines` (G, C) over G, with the dtype of `like`."""
    G, C = lines.shape
    out = torch.empty(C, dtype=like.dtype, device=like.device)
    config = _sum_config(arch(out.device), out.dtype)
    launch(
        layernorm_bwd_sum_kernel,
        (triton.cdiv(C, config.sizes["BLOCK_C"]),),
        out,
        lines,
        out,
        G,
        C=C,
        WIDE=_wide(lines.dtype),
        **config.options,
    )
    return out


def _flat(x: Tensor) -> Tensor:
    """`x` as (N, C) with the elements of a row side by side; a view where that is one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _in_registers(C: int, dtype: torch.dtype) -> bool:
    """Whether the backward holds whole rows."""
    return bool(triton.next_power_of_2(C) * dtype.itemsize <= MAX_REGISTER_BYTES)


def _dense(x: Tensor | None) -> bool:
    return x is None or x.shape[0] == 1 or x.stride(0) == x.shape[1]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _config(kernel: str, x: Tensor, dtype: torch.dtype) -> Config:
    return _width_config(kernel, arch(x.device), x.shape[1], dtype)


def _width_config(kernel: str, name: str, C: int, dtype: torch.dtype) -> Config:
    """The table's entry for the power of two that holds a row: a block's width, unless it says."""
    width = max(16, triton.next_power_of_2(C))
    config = choose(f"layernorm.{kernel}", name, dtype, str(width))
    return Config({"BLOCK_C": width, **config.sizes}, config.num_warps, config.num_stages)


def aot_cases() -> Iterator[AotCase]:
    """Widths of small and large models, one that is no multiple of 16, and the widest."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for C in (64, 768, 1000, 1600, 4096, 8192, 16384):
            for kind, fused in (("layer", True), ("rms", False)):
                yield from _aot_pair(dtype, C, kind, fused)
        yield AotCase(
            operator="layernorm",
            kernel=layernorm_bwd_sum_kernel,
            arguments={"partial_ptr": "*fp32", "out_ptr": pointer(dtype), "G": "i32"},
            constexprs={"C": 768, "WIDE": tl.float32},
            config=partial(_sum_config, dtype=dtype),
            label=f"{str(dtype)[6:]} C768 sum",
        )


def _aot_pair(dtype: torch.dtype, C: int, kind: str, fused: bool) -> Iterator[AotCase]:
    """Forward and backward: with dropout and residual, or plain."""
    x, parameter = pointer(dtype), pointer(dtype)
    extra, seed = (x, "*i64") if fused else (None, None)
    common = {"n_rows": "i32", "threshold": "i64", "scale": "fp32"}
    constants = {"C": C, "EPS": 1e-5, "RMS": kind == "rms", "WIDE": tl.float32}
    label = f"{str(dtype)[6:]} C{C} {kind}" + (" dropout residual" if fused else "")
    bias = parameter if kind == "layer" else None
    yield AotCase(
        operator="layernorm",
        kernel=layernorm_fwd_kernel,
        arguments={
            "x_ptr": x,
            "residual_ptr": extra,
            "weight_ptr": parameter,
            "bias_ptr": bias,
            "seed_ptr": seed,
            "y_ptr": x,
            "h_ptr": extra,
            "x_stride": "i32",
            "residual_stride": "i32",
            **common,
        },
        constexprs={**constants, "X_DENSE": True, "RESIDUAL_DENSE": True},
        config=lambda name: _width_config("fwd", name, C, dtype),
        label=label,
    )
    in_registers = _in_registers(C, dtype)
    table = "bwd" if in_registers else "bwd_wide"
    sums = {"dweight_ptr": "*fp32", "dbias_ptr": None if bias is None else "*fp32"}
    yield AotCase(
        operator="layernorm",
        kernel=layernorm_bwd_kernel if in_registers else layernorm_bwd_wide_kernel,
        arguments={
            "grad_y_ptr": x,
            "grad_h_ptr": extra,
            "h_ptr": x,
            "weight_ptr": parameter,
            "seed_ptr": seed,
            "dx_ptr": extra,
            "dh_ptr": x,
            **sums,
            **{f"{name}_stride": "i32" for name in ("grad_y", "grad_h", "h")},
            **common,
        },
        constexprs={
            **constants,
            "GRAD_Y_DENSE": True,
            "GRAD_H_DENSE": True,
            "H_DENSE": True,
        },
        config=lambda name: _without_grid(_width_config(table, name, C, dtype)),
        label=label,
    )


def _sum_config(name: str, dtype: torch.dtype) -> Config:
    return choose("layernorm.sum", name, dtype)


def _without_grid(config: Config) -> Config:
    """The sizes that the kernel itself takes."""
    sizes = {name: size for name, size in config.sizes.items() if name != "PER_SM"}
    return Config(sizes, config.num_warps, config.num_stages)


register_triton("layernorm", forward, supports, interpreted=INTERPRETED)
register_triton("layernorm_backward", backward, supports_backward, interpreted=INTERPRETED)
