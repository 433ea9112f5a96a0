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
    turned, rest = x[..., : 2 * R], x[..., 2 * R :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :R], turned[..., R:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned = turned.to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
