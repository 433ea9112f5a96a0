"""The two rules about dtypes: what statistics are kept in, and what autocast does."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", bound=Tensor | None)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics over `x`: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast(device: torch.device, *tensors: MaybeTensor) -> tuple[MaybeTensor, ...]:
    """The tensors in autocast's dtype where it is on for `device`; float64 stays as it is.

    torch cannot know which of its lists an operator of ours belongs to, so the public functions
    of those with matrix products apply this to their arguments themselves.
    """
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)

    def lower(x: Any) -> Any:
        return x if x is None or x.dtype == torch.float64 else x.to(dtype)

    return tuple(map(lower, tensors))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """For a body that has chosen its dtypes: autocast leaves them alone."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
