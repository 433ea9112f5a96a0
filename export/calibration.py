"""What goes into a model's products while it reads a text: the statistics that quantising needs.

The model runs in PyTorch as it is. Products are watched where PyTorch computes them, by the weight
they multiply with, so that it makes no difference whether a layer, an operator or the model's own
code does it. Inputs are never kept: each is added to a sum and forgotten.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptopt.errors import UserError
from gptopt.export.fisher import Fisher
from gptopt.export.texts import MIN_CALIBRATION
from gptopt.export.trace import Exportable

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

MAX_TOKENS = 8192
_WINDOW = 512  # tokens that are read at once
_BUDGET_BYTES = 256 * 2**20
_FISHER_TOKENS = 1024  # gradients cost as much as three times as many tokens
_FISHER_WINDOW = 256

_aten = torch.ops.aten


class Calibration:
    """Statistics of a model's products over a text, collected when they are asked for.

    One pass over the text gives second moments of all weights and the range of the cache. Hessians
    are large, so each pass collects those of as many weights, in the order the model uses them, as
    fit into `budget_bytes`; those of an earlier pass are then forgotten.

    Args:
        model: float32, on the CPU, in evaluation mode; as `gptopt.export.trace.Exportable`.
        ids: token ids of the text; at most MAX_TOKENS of them are read, spread over the text.
        budget_bytes: memory for Hessians at a time; by default somewhat more than the model's own,
            which holds all of a GPT-2.

    Raises:
        UserError: the text is too short.
    """

    def __init__(
        self, model: nn.Module, ids: Sequence[int], *, budget_bytes: int | None = None
    ) -> None:
        self._model = cast(Exportable, model)
        context = self._model.config.block_size
        self._windows = _windows(ids, min(_WINDOW, context))
        size = sum(4 * weight.numel() for weight in model.parameters())
        self._budget = max(_BUDGET_BYTES, size * 11 // 10) if budget_bytes is None else budget_bytes
        self._places = {_place(weight): name for name, weight in model.named_parameters()}
        self._moments: dict[str, Tensor] | None = None
        self._ranges: list[tuple[Tensor, Tensor]] = []
        self._hessians: dict[str, Tensor] = {}
        self._fisher: Fisher | None = None

    def moments(self, name: str) -> Tensor | None:
        """Mean squares (K,) float32 of what a weight is multiplied with; None where nothing was."""
        return self._pass_over_all().get(name)

    def hessian(self, name: str) -> Tensor | None:
        """Mean of x^T x (K, K) float32 over what a weight is multiplied with, or None."""
        if name not in self._pass_over_all():
            return None
        if name not in self._hessians:
            self._hessians = {}  # before the next ones need the memory
            self._hessians = self._run(name).hessians()
        return self._hessians[name]

    def table_hessian(self, name: str) -> Tensor | None:
        """What errors of a row cost where it is a product's weight and looked up as well (K, K).

        A row of a tied head matters by H in texts that might go on with its token, in proportion to
        p (1 - p), and by the gradient at its look-up in texts that hold the token; how often is
        nearly the same for both. None where the weight is not used in both ways.
        """
        hessian, looked_up = self.hessian(name), self.fisher.lookups.get(name)
        if hessian is None or looked_up is None:
            return None
        return self.fisher.doubt * hessian + looked_up

    @property
    def fisher(self) -> Fisher:
        """Gradients of what the model says, over a part of the text."""
        if self._fisher is None:
            length = min(_FISHER_WINDOW, self._windows[0].shape[1])
            count = min(len(self._windows), max(1, _FISHER_TOKENS // length))
            chosen = [self._windows[len(self._windows) * i // count] for i in range(count)]
            parts = [window[:, :length] for window in chosen]
            self._fisher = Fisher(cast(nn.Module, self._model), parts, self._places)
        return self._fisher

    def cache_ranges(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the largest magnitudes of keys and values, each (K, D), K heads of D channels.

        Empty where the model has no cache.
        """
        self._pass_over_all()
        return self._ranges

    def _pass_over_all(self) -> dict[str, Tensor]:
        if self._moments is None:
            sums = self._run(None)
            self._moments, self._hessians = sums.moments(), sums.hessians()
        return self._moments

    def _run(self, first: str | None) -> "_Sums":
        """Read the text; Hessians from this weight on, or from the beginning."""
        sums = _Sums(first, self._budget)
        use_cache = first is None and self._model.config.causal
        with torch.no_grad(), _Watch(self._places, sums):
            for number, window in enumerate(self._windows, 1):
                output: Any = self._model(window, use_cache=use_cache)
                if use_cache:
                    self._widen(output.present)
                logger.info("calibration: %d of %d windows", number, len(self._windows))
        return sums

    def _widen(self, present: Sequence[tuple[Tensor, Tensor]]) -> None:
        found = [(_largest(key), _largest(value)) for key, value in present]
        if self._ranges:
            found = [
                (torch.maximum(k, old_k), torch.maximum(v, old_v))
                for (k, v), (old_k, old_v) in zip(found, self._ranges, strict=True)
            ]
        self._ranges = found


def _windows(ids: Sequence[int], window: int) -> list[Tensor]:
    """Pieces (1, window) of the text, MAX_TOKENS in all at most, at equal distances."""
    if len(ids) < MIN_CALIBRATION:
        raise UserError(
            f"calibration text: {len(ids)} tokens, expected at least {MIN_CALIBRATION}; give a "
            f"longer one"
        )
    whole = len(ids) // window
    count = min(whole, max(1, MAX_TOKENS // window))
    starts = [whole * index // count * window for index in range(count)]
    return [torch.tensor([list(ids[start : start + window])]) for start in starts]


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude of each channel of each head, (B, K, S, D) -> (K, D)."""
    return x.abs().amax(dim=(0, 2)).float()


def _place(weight: Tensor) -> tuple[int, int]:
    """What a weight and all views of the whole of it have in common."""
    return weight.data_ptr(), weight.numel()


class _Sums:
    """Sums over all rows that a weight is multiplied with: squares and, where they fit, products.

    Products (K, K) are kept of the weights from `first` on, in the order of their first use, until
    the budget is spent; of one weight at least.
    """

    def __init__(self, first: str | None, budget_bytes: int) -> None:
        self._first = first
        self._left = budget_bytes
        self._open = first is None
        self._rows: dict[str, int] = {}
        self._squares: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Count the rows of x (n, K)."""
        x = x.float()
        K = x.shape[1]
        if name not in self._rows:
            self._rows[name], self._squares[name] = 0, torch.zeros(K)
            self._begin(name, K)
        self._rows[name] += x.shape[0]
        self._squares[name] += x.square().sum(0)
        if name in self._products:
            self._products[name].addmm_(x.T, x)

    def _begin(self, name: str, K: int) -> None:
        self._open = self._open or name == self._first
        if not self._open:
            return
        self._left -= 4 * K * K
        if self._products and self._left < 0:
            self._open = False
        else:
            self._products[name] = torch.zeros(K, K)

    def moments(self) -> dict[str, Tensor]:
        """Weight -> (K,), in the order of first use."""
        return {name: total / self._rows[name] for name, total in self._squares.items()}

    def hessians(self) -> dict[str, Tensor]:
        """Weight -> (K, K)."""
        return {name: total.div_(self._rows[name]) for name, total in self._products.items()}


class _Watch(TorchDispatchMode):
    """Sees every matrix product, and reports those with a known weight."""

    def __init__(self, places: dict[tuple[int, int], str], sums: _Sums) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._places = places
        self._sums = sums

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x, factor in _factors(func, args):
            name = self._places.get(_place(factor))
            if name is not None and x.ndim == 2 and x.shape[1] == factor.shape[0]:
                self._sums.add(name, x)
        return func(*args, **(kwargs or {}))


def _factors(func: Any, args: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The two factors (n, K) and (K, N) of a product."""
    if func is _aten.mm.default:
        yield args[0], args[1]
    elif func is _aten.addmm.default:
        yield args[1], args[2]
