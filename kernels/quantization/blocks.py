"""The weight format: how block-wise quantised matrices lie in bytes, and what they stand for.

The bytes are those that onnxruntime's MatMulNBits and GatherBlockQuantized read (their operator
documentation, com.microsoft domain), so that nothing is repacked between here and a graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptopt.kernels.checks import shape, wrong

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A matrix (N, K) of which each row is cut into G = ceil(K / block) blocks with one scale each.

    An element is (code - zero point) * scale, in float32, with codes 0 .. 2^bits - 1.

    Attributes:
        packed: (N, G, block * bits / 8) uint8, the codes, the first one in the lowest bits. Codes
            past K are the zero point.
        scales: (N, G) float32; they may be negative.
        zero_points: (N, ceil(G * bits / 8)) uint8, packed along G as the codes are, or None where
            all are 2^(bits - 1).
        bits: 2, 4 or 8.
        block: elements of a block, a power of two from 16 on.
        columns: K.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block: int
    columns: int

    @property
    def bytes(self) -> int:
        """Bytes of everything that is stored, scales as float32."""
        zeros = 0 if self.zero_points is None else self.zero_points.numel()
        return self.packed.numel() + 4 * self.scales.numel() + zeros


def check_format(bits: int, block: int) -> None:
    """ValueError where no kernel reads codes of this width in blocks of this size."""
    if bits not in BITS:
        raise wrong("bits", bits, f"one of {BITS}")
    if block not in BLOCKS:
        raise wrong("block", block, f"one of {BLOCKS}")


def pad_columns(matrix: Tensor, block: int) -> Tensor:
    """(N, K) with zeros added on the right until K is a multiple of the block."""
    missing = -matrix.shape[1] % block
    return torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., n) uint8 into (..., ceil(n * bits / 8)), the first in the lowest bits."""
    if bits == 8:
        return codes.contiguous()
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each))
    groups = codes.reshape(*codes.shape[:-1], -1, each)
    packed: Tensor = groups[..., 0].clone()
    for place in range(1, each):
        packed |= groups[..., place] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes (..., count) uint8 of packed bytes."""
    if bits == 8:
        return packed[..., :count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def assemble(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, block: int, columns: int
) -> Blocks:
    """Blocks from codes (N, G * block) uint8, scales (N, G) and zero points (N, G) uint8 | None."""
    if codes.shape[1] > columns:
        rest = codes.shape[1] - columns
        fill = 2 ** (bits - 1) if zeros is None else zeros[:, -1:].expand(-1, rest)
        codes[:, columns:] = fill
    return Blocks(
        packed=pack(codes, bits).view(*scales.shape, -1),
        scales=scales.float(),
        zero_points=None if zeros is None else pack(zeros, bits),
        bits=bits,
        block=block,
        columns=columns,
    )


def codes_of(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The codes (N, G, block) and the zero points (N, G), both uint8, unpacked."""
    codes = unpack(blocks.packed, blocks.bits, blocks.block)
    if blocks.zero_points is None:
        zero = 2 ** (blocks.bits - 1)
        return codes, torch.full_like(codes[..., 0], zero)
    return codes, unpack(blocks.zero_points, blocks.bits, codes.shape[1])


def dequantize(blocks: Blocks) -> Tensor:
    """The matrix (N, K) float32 that the blocks stand for, to the bit as onnxruntime computes it.

    Source: onnxruntime's operator documentation, com.microsoft.MatMulNBits.
    """
    codes, zeros = codes_of(blocks)
    centred = codes.float() - zeros.float().unsqueeze(-1)
    values = centred.mul_(blocks.scales.unsqueeze(-1))
    return values.flatten(1)[:, : blocks.columns]


def check_matrix(argument: str, matrix: Tensor) -> None:
    """ValueError unless `matrix` is (N, K) float32 with at least one element."""
    if matrix.dtype != torch.float32:
        raise wrong(argument, f"of dtype {matrix.dtype}", "float32")
    if matrix.ndim != 2 or not matrix.numel():
        raise wrong(argument, shape(matrix), "(N, K), neither of them 0")
