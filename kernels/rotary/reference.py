"""What rotary means, in plain PyTorch."""

import torch
from torch import Tensor


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate the first 2R channels of every head of q (B, H, T, D) and k (B, K, T, D)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B | 1, 1, T, R)
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair (a, b) of channels into (a cos - b sin, b cos + a sin), in the wider dtype."""
    R = cos.shape[-1]
    if x.shape[-1] > 2 * R:
        turned = rotate(x[..., : 2 * R], cos, sin, interleaved)
        return torch.cat((turned, x[..., 2 * R :]), dim=-1)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)
