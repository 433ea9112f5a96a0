"""int8 with one scale per tensor or per channel: weights of dynamic int8 products, and caches."""

from typing import NamedTuple

import torch
from torch import Tensor

from gptopt.kernels.checks import shape, wrong
from gptopt.kernels.quantization.blocks import check_matrix

_TOP = 127  # -128 is left out, so that a matrix and its negative are quantised alike
# Two neighbours' products with inputs of up to 255 are added in 16 bits, see quantize_channels.
_PAIR = (2**15 - 1) // 255


class Channels(NamedTuple):
    """A matrix (N, K): codes (N, K) int8 times scales (N,) float32."""

    codes: Tensor
    scales: Tensor


def quantize_channels(weight: Tensor) -> Channels:
    """Quantise each row of (N, K) float32 to int8 -127 .. 127 with a scale of its own.

    The format of com.microsoft DynamicQuantizeMatMul and MatMulIntegerToFloat with signed weights
    and no zero point, which take it transposed, (K, N).

    Two neighbouring codes (of columns 2i and 2i + 1) of one sign add up to 128 at most. Processors
    without dot products of int8 (x86 before VNNI) multiply such pairs with uint8 inputs and add
    them in saturating 16 bits: larger pairs would be cut off there, and a file would say something
    else than where it was made. Source: Intel, Software Developer's Manual, VPMADDUBSW.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    check_matrix("weight", weight)
    scales = torch.maximum(weight.abs().amax(1) / _TOP, _largest_pair(weight) / _PAIR)
    inverse = torch.where(scales < 1e-30, 0.0, 1.0 / scales)
    codes = (weight * inverse.unsqueeze(1)).round_().clamp_(-_TOP, _TOP)
    return Channels(codes.to(torch.int8), scales)


def _largest_pair(weight: Tensor) -> Tensor:
    """(N,): the largest sum, in magnitude, of two neighbours of one sign in a row of (N, K)."""
    if weight.shape[1] % 2:
        weight = torch.nn.functional.pad(weight, (0, 1))
    pairs = weight.reshape(len(weight), -1, 2)
    above, below = pairs.clamp(min=0).sum(-1), pairs.clamp(max=0).sum(-1)
    return torch.maximum(above.amax(1), -below.amin(1))


def dequantize_channels(channels: Channels) -> Tensor:
    """The matrix (N, K) float32 that the codes stand for."""
    return channels.codes.float() * channels.scales.unsqueeze(1)


def cache_scale(largest: Tensor, *, per: str = "tensor") -> Tensor:
    """Scales of an int8 cache, from the largest magnitudes (K, D) that its channels have had.

    Args:
        largest: (K, D) float, K heads of D channels.
        per: "tensor" for one scale, "channel" for one per head and channel.

    Returns:
        (1,) or (1, K, 1, D) float32, as GroupQueryAttention takes them (PER_TENSOR, PER_CHANNEL).

    Raises:
        ValueError: another `per`, or another shape.
    """
    if largest.ndim != 2:
        raise wrong("largest", shape(largest), "(K, D)")
    if per not in ("tensor", "channel"):
        raise wrong("per", per, "'tensor' or 'channel'")
    found = largest.float().amax().view(1) if per == "tensor" else largest.float()[None, :, None]
    return (found / _TOP).clamp(min=1e-30)


def quantize_cache(x: Tensor, scale: Tensor) -> Tensor:
    """Keys or values (B, K, S, D) as int8, with a scale (1,) or (1, K, 1, D)."""
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


def dequantize_cache(codes: Tensor, scale: Tensor) -> Tensor:
    """The keys or values (B, K, S, D) float32 that an int8 cache stands for."""
    return codes.float() * scale
