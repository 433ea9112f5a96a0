"""Weights and caches in few bits: the formats that edge runtimes read, and how to get into them.

    quantize  dequantize  fake_quantize      blocks of a row share a scale: 8, 4 or 2 bits
    on_grid                                  the same, with scales that are given
    quantize_channels  dequantize_channels   int8, a scale per row
    cache_scale  quantize_cache  dequantize_cache   int8 keys and values

Shapes: N outputs and K inputs of a linear layer (its weight is (N, K)), G blocks of a row.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from gptopt.kernels.checks import check_float, check_shape, shape, wrong
from gptopt.kernels.quantization.blocks import (
    BITS,
    BLOCKS,
    Blocks,
    assemble,
    check_format,
    check_matrix,
    codes_of,
    dequantize,
    pad_columns,
)
from gptopt.kernels.quantization.channels import (
    Channels,
    cache_scale,
    dequantize_cache,
    dequantize_channels,
    quantize_cache,
    quantize_channels,
)
from gptopt.kernels.quantization.gptq import gptq
from gptopt.kernels.quantization.rounding import encode, nearest, search

__all__ = [
    "BITS",
    "BLOCKS",
    "Blocks",
    "Channels",
    "Method",
    "cache_scale",
    "codes_of",
    "dequantize",
    "dequantize_cache",
    "dequantize_channels",
    "fake_quantize",
    "on_grid",
    "quantize",
    "quantize_cache",
    "quantize_channels",
]

_TOGETHER = 2**20  # elements of a matrix
Method = Literal["nearest", "search", "gptq"]


def quantize(
    weight: Tensor,
    *,
    bits: int,
    block: int,
    symmetric: bool = True,
    method: Method = "nearest",
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> Blocks:
    """Quantise a matrix in blocks along its rows.

    "nearest" rounds in a range that clips nothing. "search" finds each block's scale (and zero
    point) of least squared error, weighted by `importance`. "gptq" also lets later columns make up
    for the errors of earlier ones, as far as the inputs' `hessian` says they can.

    Args:
        weight: (N, K) float32 on the CPU. K need not be a multiple of the block.
        bits: 8, 4 or 2.
        block: elements that share a scale: 16, 32, 64, 128 or 256.
        symmetric: the zero point is 2^(bits - 1); otherwise each block has one of its own.
        method: "nearest", "search" or "gptq".
        importance: (K,), mean squares of the inputs; for "search".
        hessian: (K, K), mean of x^T x over inputs x (n, K); needed for "gptq".

    Raises:
        ValueError: a wrong shape, dtype or option, or values that are not finite.

    Source: format, onnxruntime's operator documentation (com.microsoft.MatMulNBits); gptq, Frantar
    et al. 2022, arXiv:2210.17323.
    """
    check_matrix("weight", weight)
    check_format(bits, block)
    _check_method(method, weight.shape[1], importance, hessian)
    if not torch.isfinite(weight).all():
        raise wrong("weight", "not finite everywhere", "finite numbers")
    columns = weight.shape[1]
    padded = pad_columns(weight.detach(), block)
    if method == "gptq":
        assert hessian is not None
        missing = padded.shape[1] - columns
        found = gptq(
            padded,
            torch.nn.functional.pad(hessian, (0, missing, 0, missing)),
            bits=bits,
            block=block,
            symmetric=symmetric,
        )
        codes, scales, zeros = (part.T for part in found)
    else:
        codes, scales, zeros = _independent(padded, bits, block, symmetric, method, importance)
    return assemble(
        codes.to(torch.uint8, memory_format=torch.contiguous_format),
        scales.contiguous(),
        None if symmetric else zeros.to(torch.uint8),
        bits=bits,
        block=block,
        columns=columns,
    )


def on_grid(weight: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, block: int) -> Tensor:
    """The weight (N, K) float32 rounded to what codes of these scales and zero points stand for.

    As `dequantize` computes it, to the bit; on any device.

    Args:
        weight: (N, K) float32. K need not be a multiple of the block.
        scales: (N, G) float32, G blocks of a row, as in `Blocks`.
        zeros: (N, G), whole numbers, as `codes_of` gives them.
        bits: 8, 4 or 2.
        block: elements that share a scale.

    Raises:
        ValueError: a wrong shape, dtype or option.
    """
    check_matrix("weight", weight)
    check_format(bits, block)
    N, K = weight.shape
    G = -(-K // block)
    check_shape("scales", scales, "(N, G)", N, G)
    check_shape("zeros", zeros, "(N, G)", N, G)
    cut = pad_columns(weight, block).view(N, G, block)
    steps, centres = scales.unsqueeze(-1), zeros.float().unsqueeze(-1)
    codes = encode(cut, steps, centres, bits)
    return codes.sub_(centres).mul_(steps).flatten(1)[:, :K]


def _independent(
    weight: Tensor,
    bits: int,
    block: int,
    symmetric: bool,
    method: Method,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, G * block), scales and zero points (N, G), each block for itself.

    Rows are taken some at a time, so that what is made on the way stays small beside the matrix.
    """
    padded = weight.shape[1]
    parts = []
    for rows in weight.split(max(1, _TOGETHER // padded)):
        n, blocks = len(rows), rows.reshape(-1, block)
        if method == "nearest":
            found = nearest(blocks, bits=bits, symmetric=symmetric)
        else:
            weights = None
            if importance is not None:
                missing = padded - importance.shape[0]
                weights = torch.nn.functional.pad(importance.float(), (0, missing))
                weights = weights.view(1, -1, block).expand(n, -1, -1).reshape(-1, block)
            found = search(blocks, weights, bits=bits, symmetric=symmetric)
        codes = found.codes.to(torch.uint8).view(n, padded)
        parts.append((codes, found.scales.view(n, -1), found.zeros.view(n, -1)))
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scales, zeros


def _check_method(method: str, K: int, importance: Tensor | None, hessian: Tensor | None) -> None:
    if method not in get_args(Method):
        raise wrong("method", repr(method), f"one of {get_args(Method)}")
    if importance is not None:
        check_shape("importance", importance, "(K,)", K)
    if hessian is not None:
        check_float("hessian", hessian)
        check_shape("hessian", hessian, "(K, K)", K, K)
    if method == "gptq" and hessian is None:
        raise wrong("hessian", None, f"{(K, K)}, which method 'gptq' needs")


def fake_quantize(
    weight: Tensor, *, bits: int, block: int, symmetric: bool = True, method: Method = "nearest"
) -> Tensor:
    """The weight (N, K) as it is after quantising, differentiable as if it were unchanged.

    The gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432, section 4), so that a
    model can be trained to live with its quantised weights.

    Raises:
        ValueError: as `quantize`; "gptq" is no method here, it needs inputs.
    """
    if method == "gptq":
        raise wrong("method", "'gptq'", "'nearest' or 'search'")
    if weight.ndim != 2:
        raise wrong("weight", shape(weight), "(N, K)")
    found = quantize(
        weight.detach().float(), bits=bits, block=block, symmetric=symmetric, method=method
    )
    rounded = dequantize(found).to(weight.dtype)
    return weight + (rounded - weight).detach()
