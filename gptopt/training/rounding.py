"""Quantisation-aware training: weights work as an export rounds them, and are kept as they are.

A step's forward and backward passes see rounded weights, its update goes to the kept ones, as if
rounding were the identity (Bengio et al. 2013, arXiv:1308.3432, section 4). Rounded weights lie on
the export's grid: whatever method an export finds its scales by, it finds these again.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gptopt.config import ModelConfig
from gptopt.errors import UserError
from gptopt.kernels.quantization import (
    dequantize,
    dequantize_channels,
    quantize,
    quantize_channels,
)
from gptopt.model import GPT
from gptopt.precisions import PRECISIONS, BlockFormat, ChannelFormat, Precision

MASTER = "master."  # before the names of the kept weights in a checkpoint

_Round = Callable[[Tensor], Tensor]


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

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """A weight (N, K) as it is after an export; itself where the export leaves it alone."""
        how = self._how(name, weight)
        return weight if how is None else how(weight)

    def rounds(self, name: str, weight: Tensor) -> bool:
        """Whether an export rounds a weight; its values are not read."""
        return self._how(name, weight) is not None

    @contextlib.contextmanager
    def applied(self, model: GPT) -> Iterator[None]:
        """The model's weights are rounded inside, and what they were outside."""
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if (how := self._how(name, parameter)) is not None:
                    kept.append((parameter, parameter.detach().clone()))
                    parameter.copy_(how(parameter.detach()))
        try:
            yield
        finally:
            with torch.no_grad():
                for rounded, value in kept:
                    rounded.copy_(value)

    def _how(self, name: str, weight: Tensor) -> _Round | None:
        if weight.ndim != 2 or name == "wpe.weight":
            return None
        K = weight.shape[1]
        # The embedding is read by rows, and as the head's matrix where that is tied.
        at_the_ends = name in ("wte.weight", "head.weight")
        usual = self._precision.head if at_the_ends else self._precision.layers
        form = self._precision.overrides.get(name, usual)
        if isinstance(form, ChannelFormat):
            return _channels
        fitted = form and form.fitted(K, looked_up=name == "wte.weight")
        return None if fitted is None else _blocks(fitted)


def _blocks(form: BlockFormat) -> _Round:
    def rounded(weight: Tensor) -> Tensor:
        found = quantize(weight.float(), bits=form.bits, block=form.block, symmetric=form.symmetric)
        return dequantize(found).to(weight.dtype)

    return rounded


def _channels(weight: Tensor) -> Tensor:
    return dequantize_channels(quantize_channels(weight.float())).to(weight.dtype)
