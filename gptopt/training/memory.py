"""What a computation holds in memory, tensor by tensor; with fake tensors, without holding it."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside, for as long as it lives.

    An allocator rounds sizes up, and keeps what it was given back: a process takes some more.

    Attributes:
        held, peak: bytes now, and at the most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                size = storage.nbytes()
                self._known[key] = weakref.ref(storage, partial(self._let_go, key, size))
                self.held += size
        self.peak = max(self.peak, self.held)

    def _let_go(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self.held -= size

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Their sizes together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def without_values(model: nn.Module, device: torch.device) -> None:
    """Give a model, in place, parameters that have shapes alone; inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
