"""What autocast means for an operator: torch cannot know, so the public functions apply it."""

import torch
from torch import Tensor


def autocast(first: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The tensors in autocast's dtype where it is on for their device; float64 stays as it is."""
    tensors = [first, *others]
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = first.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
