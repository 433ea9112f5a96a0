"""How much a model minds that its weights are not exact: gradients, on a text, of what it says.

For small errors E of a weight (N, K) with inputs x the divergence of the changed model from the
original is half of the mean of (g E x)^2, g being the gradient of log p(y) at the product's outputs
and y drawn from what the model itself says. Mean squares of g and x, kept apart, tell it well
enough to compare formats.

Source: the Fisher information as the curvature of the divergence; factors as Martens and Grosse
2015, arXiv:1503.05671.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

_SEED = 7
_PRODUCTS = (
    functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__,
)  # fmt: skip


class Fisher:
    """Gradients of what a model says, at its products and look-ups.

    Args:
        model: float32, in evaluation mode; model(ids).logits.
        windows: ids (1, T) to read.
        places: (data_ptr, numel) -> name of a weight.

    Attributes:
        outputs: weight -> (N,), mean squares of the gradient at the outputs of its products.
        lookups: table -> (K, K), mean of g^T g over rows that were looked up.
        doubt: mean of 1 - sum of p^2: how far the model is from being sure, 0 .. 1.
    """

    def __init__(
        self, model: nn.Module, windows: Sequence[Tensor], places: dict[tuple[int, int], str]
    ) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.lookups: dict[str, Tensor] = {}
        self.doubt = 0.0
        generator = torch.Generator().manual_seed(_SEED)
        tokens = 0
        with _frozen(model), torch.enable_grad():
            for window in windows:
                with _Hooks(self, places):
                    logits: Tensor = model(window).logits
                    told = logits.float().flatten(0, 1).log_softmax(-1)
                if not told.requires_grad:
                    break  # its table is not looked up by torch's embedding: nothing is known
                chances = told.detach().exp()
                drawn = torch.multinomial(chances, 1, generator=generator)
                told.gather(1, drawn).sum().backward()
                self.doubt += float((1 - chances.square().sum(-1)).sum())
                tokens += len(told)
        for sums in (self.outputs, self.lookups):
            for total in sums.values():
                total /= max(tokens, 1)
        self.doubt /= max(tokens, 1)
        logger.info("sensitivity: %d tokens", tokens)

    def add_output(self, name: str, gradient: Tensor) -> None:
        """Count the gradient (..., N) at the outputs of a product."""
        squares = gradient.flatten(0, -2).square().sum(0)
        self.outputs[name] = self.outputs.get(name, torch.zeros(())) + squares

    def add_lookup(self, name: str, gradient: Tensor) -> None:
        """Count the gradient (..., K) at rows that were looked up."""
        rows = gradient.flatten(0, -2)
        self.lookups[name] = self.lookups.get(name, torch.zeros(())) + rows.T @ rows


class _Hooks(TorchFunctionMode):
    """Leaves a hook at every product with, and look-up in, a known weight."""

    def __init__(self, fisher: Fisher, places: dict[tuple[int, int], str]) -> None:
        super().__init__()
        self._fisher, self._places = fisher, places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        add: Callable[[str, Tensor], None] | None = None
        if func is functional.embedding:
            add = self._fisher.add_lookup
            out = out if out.requires_grad else out.requires_grad_()
        elif func in _PRODUCTS and out.requires_grad:
            add = self._fisher.add_output
        weight = args[1] if add is not None and len(args) > 1 else None
        if add is not None and isinstance(weight, Tensor):
            name = self._places.get((weight.data_ptr(), weight.numel()))
            if name is not None:
                out.register_hook(_counting(add, name))
        return out


def _counting(add: Callable[[str, Tensor], None], name: str) -> Callable[[Tensor], None]:
    return lambda gradient: add(name, gradient.detach())


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters, which nobody asks for."""
    learned = [each for each in model.parameters() if each.requires_grad]
    for each in learned:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in learned:
            each.requires_grad_(True)
