"""Quantisation-aware training: weights work as an export rounds them, and are kept as they are.

A step's forward and backward passes see rounded weights, its update goes to the kept ones, as if
rounding were the identity (Bengio et al. 2013, arXiv:1308.3432, section 4). A model that was
trained before keeps the grid that the export's search finds for it at the start: one that is found
anew at every step moves all weights of a block when one of them moves, and less is learned. Weights
that are drawn at random outgrow any grid, so theirs is that of their range at each step.

An export finds rounded weights again, whatever its method; of those on a kept grid all but about
one block in a hundred, whose weights have left the ends of its range: it rounds them once more.
"""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from gptopt.config import ModelConfig
from gptopt.errors import UserError
from gptopt.kernels.quantization import (
    codes_of,
    dequantize,
    dequantize_channels,
    on_grid,
    quantize,
    quantize_channels,
)
from gptopt.model import GPT
from gptopt.precisions import PRECISIONS, BlockFormat, ChannelFormat, Format, Precision

MASTER = "master."  # before the names of the kept weights in a checkpoint
_GRID = "grid."
_PARTS = ("scales", "zeros")


class Rounding:
    """Which weights of a model an export of some precision rounds, and how.

    Args:
        config: the model's.
        precision: name of one with quantised weights.

    Raises:
        UserError: there is no such precision, or it quantises nothing.
    """

    def __init__(self, config: ModelConfig, precision: str) -> None:
        able = [name for name, each in PRECISIONS.items() if each.quantized]
        if precision not in able:
            raise UserError(f"--qat {precision}: expected one of {', '.join(able)}")
        self._config = config
        self._precision: Precision = PRECISIONS[precision]
        # weight -> its scales and zero points (N, G), where they stay as they are
        self._grids: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """A weight (N, K) as it is after an export; itself where the export leaves it alone."""
        form = self._form(name, weight)
        if form is None:
            return weight
        values = weight.float()
        if isinstance(form, ChannelFormat):
            rounded = dequantize_channels(quantize_channels(values))
        elif name in self._grids:
            rounded = on_grid(values, *self._grids[name], bits=form.bits, block=form.block)
        else:
            rounded = dequantize(
                quantize(values, bits=form.bits, block=form.block, symmetric=form.symmetric)
            )
        return rounded.to(weight.dtype)

    def keep_grids(self, model: GPT, names: Collection[str]) -> None:
        """Find the grids of these weights as they are now; from here on they stay."""
        for name, weight in model.named_parameters():
            form = self._form(name, weight)
            if name in names and isinstance(form, BlockFormat):
                found = quantize(
                    weight.detach().float().cpu(), bits=form.bits, block=form.block,
                    symmetric=form.symmetric, method="search",
                )  # fmt: skip
                grid = (found.scales, codes_of(found)[1])
                self._grids[name] = (grid[0].to(weight.device), grid[1].to(weight.device))

    def grids(self) -> dict[str, Tensor]:
        """The grids that stay, for a checkpoint."""
        return {
            f"{_GRID}{part}.{name}": value
            for name, grid in self._grids.items()
            for part, value in zip(_PARTS, grid, strict=True)
        }

    def take_grids(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Go on with the grids of a checkpoint, which are taken out of its tensors."""
        first = f"{_GRID}{_PARTS[0]}."
        for name in [key.removeprefix(first) for key in tensors if key.startswith(first)]:
            scales, zeros = (tensors.pop(f"{_GRID}{part}.{name}").to(device) for part in _PARTS)
            self._grids[name] = (scales, zeros)

    def rounds(self, name: str, weight: Tensor) -> bool:
        """Whether an export rounds a weight; its values are not read."""
        return self._form(name, weight) is not None

    @contextlib.contextmanager
    def applied(self, model: GPT) -> Iterator[None]:
        """The model's weights are rounded inside, and what they were outside."""
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self._form(name, parameter) is not None:
                    kept.append((parameter, parameter.detach().clone()))
                    parameter.copy_(self(name, parameter.detach()))
        try:
            yield
        finally:
            with torch.no_grad():
                for rounded, value in kept:
                    rounded.copy_(value)

    def _form(self, name: str, weight: Tensor) -> Format | None:
        if weight.ndim != 2 or name == "wpe.weight":
            return None
        # The embedding is read by rows, and as the head's matrix where that is tied; the last
        # product of a classifier is that of its scores.
        at_the_ends = name in ("wte.weight", "head.weight", "score.weight")
        usual = self._precision.head if at_the_ends else self._precision.layers
        form = self._precision.overrides.get(name, usual)
        if not isinstance(form, BlockFormat):
            return form
        return form.fitted(weight.shape[1], looked_up=name == "wte.weight")
