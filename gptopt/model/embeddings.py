"""How tokens and their order enter the model: position ids, sinusoids, rotary angles, ALiBi slopes.

Everything here is computed from the position ids in fp32, whatever the model's precision. There are
no buffers: a model cast to bfloat16 keeps exact angles, and a model built on the meta device is
complete as soon as its weights are loaded.
"""

import math

import torch
from torch import Tensor


def count_positions(attention_mask: Tensor, past_length: int) -> Tensor:
    """Position ids (B, T) int64 of the new tokens: real tokens are counted, padding is not.

    Padding on either side therefore never moves a token. A padded position gets some id that is in
    range; what is computed there is never read.

    Args:
        attention_mask: (B, S) bool, True = real token, S = past_length + T.
        past_length: P, tokens that are in the cache already.
    """
    counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted[:, past_length:]


def document_positions(doc_ids: Tensor) -> Tensor:
    """Position ids (B, S) int64 that begin at 0 wherever doc_ids (B, S) change."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    begins = torch.zeros_like(doc_ids, dtype=torch.int64)
    begins[:, 1:] = torch.where(doc_ids[:, 1:] != doc_ids[:, :-1], index[1:], 0)
    return index - begins.cummax(dim=1).values


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """positions (B, T) times the frequencies base^(-2i / width): (B, T, width / 2) fp32."""
    even = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / base ** (even / width)
    return positions[..., None].float() * frequencies


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Fixed position vectors (B, T, width) fp32: sine in even channels, cosine in odd ones.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    angles = _angles(positions, width, 10000.0)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(*positions.shape, width)


def rotary_tables(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, D / 2) fp32 that turn queries and keys at these positions.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.
    """
    angles = _angles(positions, head_dim, base)
    return angles.cos(), angles.sin()


def alibi_slopes(n_head: int, device: torch.device) -> Tensor:
    """One slope per head (H,) fp32: the geometric series 2^(-8/H), 2^(-16/H), ...

    Where H is no power of two, the series of the next smaller power n is completed with every other
    slope of the series of 2n.

    Source: Press et al. 2022, arXiv:2108.12409, section 3 and its published code.
    """
    n = 2 ** int(math.log2(n_head))
    steps = torch.arange(1, n + 1, device=device, dtype=torch.float32)
    slopes = torch.exp2(steps * (-8.0 / n))
    if n == n_head:
        return slopes
    odd = torch.arange(1, 2 * (n_head - n), 2, device=device, dtype=torch.float32)
    return torch.cat((slopes, torch.exp2(odd * (-4.0 / n))))
