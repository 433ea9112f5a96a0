"""The fused form of ffn's backward: when it runs, its launch, what is compiled of it.

dx = (grad * act'(hidden)) W, and with a gate + (grad * act(hidden)) Wg in the same accumulator. The
weights' gradients are products of cuBLAS in both forms: they need all rows of what is found here.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from gptopt.kernels.ffn.reference import GATED
from gptopt.kernels.ffn.triton_kernels import ffn_bwd_dx_kernel
from gptopt.kernels.launch import AotCase, Config, arch, choose, launch, pointer

_MAX_ROW_STRIDE = 2**22  # a block's 256 rows have to stay within 32-bit offsets


def as_rows(x: Tensor, M: int) -> Tensor:
    """`x` as M rows, each of them contiguous, and near enough to each other for 32 bits."""
    x = x.reshape(M, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) <= _MAX_ROW_STRIDE else x.contiguous()


def dot_precision() -> str:
    """How float32 is multiplied: as cuBLAS would."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def is_aligned(*operands: Tensor | None) -> bool:
    """Whether the rows of all of them can be read 16 bytes at a time."""
    given = [y for y in operands if y is not None]
    return all(y.data_ptr() % 16 == 0 and y.stride(0) % 16 == 0 for y in given)


def word(dtype: torch.dtype) -> str:
    """The name of `dtype` as the tables have it."""
    return str(dtype).removeprefix("torch.")


def is_fused(grad: Tensor, weight: Tensor, gate_weight: Tensor | None, activation: str) -> bool:
    """Whether the fused form that finds the derivative inside the product runs."""
    aligned = weight.shape[0] % 16 == 0 and is_aligned(grad, weight, gate_weight)
    shape_class = activation if aligned else f"{activation} odd"
    config = choose("ffn.bwd_form", arch(grad.device), grad.dtype, shape_class)
    return weight.shape[1] <= config.sizes["FUSED_C"]


def multiply(
    grad: Tensor,
    kept: tuple[Tensor, Tensor | None],
    weights: tuple[Tensor, Tensor | None],
    dx: Tensor,
    found: Sequence[Tensor | None],
    activation: str,
) -> None:
    """The fused kernel: writes dx and those of `found` that are given."""
    hidden, gate = kept
    F, C = weights[0].shape
    M = len(grad)
    weight, gate_weight = (None if w is None else as_rows(w, F) for w in weights)
    assert weight is not None
    config = _dx_config(arch(grad.device), grad.dtype, activation)
    sizes = config.sizes
    launch(
        ffn_bwd_dx_kernel,
        (triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(C, sizes["BLOCK_C"]),),
        grad,
        grad,
        hidden,
        gate,
        weight,
        gate_weight,
        dx,
        *found,
        M,
        F,
        C,
        grad.stride(0),
        weight.stride(0),
        0 if gate_weight is None else gate_weight.stride(0),
        ACTIVATION=activation,
        PRECISION=dot_precision(),
        MASK=F % sizes["BLOCK_F"] != 0 or C % sizes["BLOCK_C"] != 0,
        **config.options,
    )


def tile_rows(M: int, x: Tensor, activation: str) -> tuple[int, int]:
    """How many tiles of rows the fused kernel has, and how many rows each."""
    rows = _dx_config(arch(x.device), x.dtype, activation).sizes["BLOCK_M"]
    return triton.cdiv(M, rows), rows


def _dx_config(name: str, dtype: torch.dtype, activation: str) -> Config:
    return choose("ffn.bwd_dx", name, dtype, activation)


def dx_case(dtype: torch.dtype, activation: str, precision: str, whole: bool) -> AotCase:
    """The fused kernel with everything stored; `whole` where blocks divide F and C."""
    gated = activation in GATED
    gate = pointer(dtype) if gated else None
    sizes = ("F", "C", "grad_stride", "weight_stride", "gate_stride")
    words = [word(dtype), activation, "" if whole else "tail", precision]
    return AotCase(
        "ffn",
        ffn_bwd_dx_kernel,
        {
            **dict.fromkeys(("grad_ptr", "hidden_ptr", "weight_ptr"), pointer(dtype)),
            **dict.fromkeys(("dx_ptr", "dhidden_ptr"), pointer(dtype)),
            **dict.fromkeys(("gate_ptr", "gate_weight_ptr", "dgate_ptr"), gate),
            "dbias_ptr": "*fp32",
            "dgate_bias_ptr": "*fp32" if gated else None,
            "M": "i32",
            **dict.fromkeys(sizes, "i32:16"),
        },
        {"ACTIVATION": activation, "PRECISION": precision, "MASK": not whole},
        lambda arch: _dx_config(arch, dtype, activation),
        " ".join(filter(None, words)),
        dot=dtype != torch.float32,
    )
