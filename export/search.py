"""Which matrix is kept in how many bits, so that a file keeps to a budget and loses little.

What each format of each matrix costs is foretold from gradients and inputs on the calibration text
(fisher.py); of all mixes those on the Pareto front of bytes and divergence are worth a look. A mix
is then built and measured on held-out text, as the file will be.
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
from torch import Tensor

from gptopt.errors import UserError
from gptopt.export.budget import Budget
from gptopt.export.calibration import Calibration
from gptopt.export.quality import Quality
from gptopt.export.quantize import Product, looks_up_tokens, matrix, products
from gptopt.kernels.quantization import dequantize, quantize
from gptopt.precisions import Allowed, BlockFormat, Precision

logger = logging.getLogger(__name__)

_ROWS = 4096  # of a matrix that are looked at together
_TRIES = 6


def _format(bits: int, block: int, *, symmetric: bool = True) -> BlockFormat:
    return BlockFormat(bits=bits, block=block, symmetric=symmetric, method="gptq")


CANDIDATES = (
    _format(2, 32, symmetric=False), _format(4, 128), _format(4, 64), _format(4, 32),
    _format(4, 32, symmetric=False), _format(8, 128),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mix:
    """Formats by weight, the bytes of these weights, and the divergence foretold in nats."""

    formats: Mapping[str, BlockFormat]
    bytes: int
    divergence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A mix that was built: its place on the front, bytes of the file, what it said and how fast.

    `tokens_per_s` is None unless the budget asks for it.
    """

    place: int
    bytes: int
    quality: Quality
    tokens_per_s: float | None = None

    def value(self, kind: str) -> float:
        """What a budget of this kind is compared with."""
        if kind == "ppl":
            found = self.quality.increase
            return self.quality.mean_kl if found is None else found
        return float(self.bytes if kind == "bytes" else self.tokens_per_s or 0.0)


@dataclass(slots=True)
class Found:
    """The mix that keeps to a budget, and how it was found."""

    budget: Budget
    front: Sequence[Mix]
    measured: list[Measured] = field(default_factory=list)
    place: int = -1

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "budget": str(self.budget),
            "formats": {
                name: {"bits": form.bits, "block": form.block, "symmetric": form.symmetric}
                for name, form in self.front[self.place].formats.items()
            },
            "front": [{"bytes": mix.bytes, "divergence": mix.divergence} for mix in self.front],
            "place": self.place,
            "measured": [
                {
                    "place": each.place, "bytes": each.bytes,
                    "mean_kl": each.quality.mean_kl, "increase": each.quality.increase,
                    "tokens_per_s": each.tokens_per_s,
                }
                for each in self.measured
            ],
        }  # fmt: skip


def mixed(precision: Precision, mix: Mix, budget: Budget) -> Precision:
    """The precision with the formats of a mix, held to the budget on held-out text."""
    allowed = Allowed(perplexity=budget.limit if budget.kind == "ppl" else None)
    return replace(precision, overrides=mix.formats, allowed=allowed)


def pareto_front(
    graph: ir.Graph, calibration: Calibration, candidates: Sequence[BlockFormat] = CANDIDATES
) -> list[Mix]:
    """Mixes from the smallest to the best, each of the least divergence for its bytes.

    From the smallest on, each mix changes the one matrix that gains most per byte; steps of a
    matrix that are not on its own convex hull are left out, so that the gains only fall.
    """
    start: dict[str, BlockFormat] = {}
    total_bytes, total = 0, 0.0
    steps: list[tuple[float, str, BlockFormat, int, float]] = []
    for product in {each.weight.name: each for each in products(graph)}.values():
        name, hull = product.weight.name or "", _hull(_costs(product, calibration, candidates))
        if not hull:
            continue
        start[name], smallest, worst = hull[0]
        total_bytes, total = total_bytes + smallest, total + worst
        for (_, less, more), (form, size, cost) in itertools.pairwise(hull):
            steps.append(((more - cost) / (size - less), name, form, size - less, more - cost))
    mixes = [Mix(dict(start), total_bytes, total)] if start else []
    for _, name, form, size, gain in sorted(steps, key=lambda each: -each[0]):
        last = mixes[-1]
        mixes.append(
            Mix({**last.formats, name: form}, last.bytes + size, max(last.divergence - gain, 0.0))
        )
    return mixes


def _costs(
    product: Product, calibration: Calibration, candidates: Sequence[BlockFormat]
) -> list[tuple[BlockFormat, int, float]]:
    """(format, bytes, divergence) of each candidate; none where the gradients never came."""
    name = product.weight.name or ""
    outputs, inputs = calibration.fisher.outputs.get(name), calibration.moments(name)
    weight = matrix(product)
    if outputs is None or inputs is None or outputs.shape != weight.shape[:1]:
        return []
    table = calibration.fisher.lookups.get(name)
    looked_up = any(looks_up_tokens(node) for node in product.weight.consumers())
    rows = None if table is None or not looked_up else table.diagonal() / len(weight)
    found: dict[BlockFormat, tuple[int, float]] = {}
    for form in candidates:
        form = form.fitted(weight.shape[1], looked_up=looked_up) or form
        if form not in found:
            found[form] = _cost(weight, form, outputs, inputs, rows)
    return [(form, *cost) for form, cost in found.items()]


def _cost(
    weight: Tensor, form: BlockFormat, outputs: Tensor, inputs: Tensor, rows: Tensor | None
) -> tuple[int, float]:
    """Bytes, and half of the sum of G e^2 H with diagonal G and H, over errors of rounding."""
    size, cost = 0, 0.0
    for start in range(0, len(weight), _ROWS):
        piece = weight[start : start + _ROWS]
        blocks = quantize(piece, bits=form.bits, block=form.block, symmetric=form.symmetric)
        squares = (dequantize(blocks) - piece).square_()
        size += blocks.bytes
        cost += 0.5 * float(outputs[start : start + _ROWS] @ (squares @ inputs))
        if rows is not None:
            cost += 0.5 * float((squares @ rows).sum())
    return size, cost


def _hull(
    costs: Sequence[tuple[BlockFormat, int, float]],
) -> list[tuple[BlockFormat, int, float]]:
    """Those on the lower convex hull of bytes and divergence, by bytes."""
    hull: list[tuple[BlockFormat, int, float]] = []
    for each in sorted(costs, key=lambda cost: (cost[1], cost[2])):
        if hull and each[2] >= hull[-1][2]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], each):
            hull.pop()
        hull.append(each)
    return hull


def _slope(one: tuple[Any, int, float], other: tuple[Any, int, float]) -> float:
    return (one[2] - other[2]) / (other[1] - one[1])


def search(front: Sequence[Mix], budget: Budget, build: Callable[[int], Measured]) -> Found:
    """The mix of the front that keeps to the budget: the smallest, or of bytes the best.

    Args:
        front: see `pareto_front`.
        budget: a limit.
        build: makes and measures the mix at a place of the front.

    Raises:
        UserError: no mix keeps to it; says how near one comes.
    """
    found = Found(budget, front)

    def measure(place: int) -> Measured:
        each = build(place)
        found.measured.append(each)
        logger.info(
            "budget %s: %d bytes: %s", budget, each.bytes, budget.show(each.value(budget.kind))
        )
        return each

    if budget.kind == "ppl":
        _least(front, budget.limit, measure, found)
    else:
        _largest(front, budget, measure, found)
    if found.place < 0:
        values = [each.value(budget.kind) for each in found.measured]
        nearest = max(values) if budget.kind == "tokens/s" else min(values)
        raise UserError(
            f"--budget {budget}: no mix of formats keeps to it, the nearest has "
            f"{budget.show(nearest)}; allow that much, or choose another precision"
        )
    return found


def _least(
    front: Sequence[Mix], limit: float, measure: Callable[[int], Measured], found: Found
) -> None:
    """The smallest mix whose perplexity is low enough, by bisection from what was foretold."""
    low, high = 0, len(front) - 1  # the answer, if any, is in low .. high
    place = next((i for i, mix in enumerate(front) if mix.divergence <= limit), high)
    for _ in range(_TRIES):
        if measure(place).value("ppl") <= limit:
            found.place, high = place, place - 1
        else:
            low = place + 1
        if low > high:
            break
        place = (low + high) // 2
    last = len(front) - 1
    untried = found.place < 0 and all(each.place != last for each in found.measured)
    if untried and measure(last).value("ppl") <= limit:
        found.place = last


def _largest(
    front: Sequence[Mix], budget: Budget, measure: Callable[[int], Measured], found: Found
) -> None:
    """The last mix that is small, or fast, enough.

    Each mix tells where to look next, for what a file holds beside these weights is nearly the same
    in all, and the time of a token goes with the bytes that it reads; only a measured mix is taken.
    """
    is_bytes = budget.kind == "bytes"

    def keeps(each: Measured) -> bool:
        value = each.value(budget.kind)
        return value <= budget.limit if is_bytes else value >= budget.limit

    def last_within(room: float) -> int:
        return max((i for i, mix in enumerate(front) if mix.bytes <= room), default=0)

    place = last_within(budget.limit) if is_bytes else len(front) // 2
    beyond = len(front)  # the answer, if any, lies in found.place .. beyond - 1
    for _ in range(_TRIES):
        each, size = measure(place), front[place].bytes
        if keeps(each):
            found.place = place
        else:
            beyond = place
        if is_bytes:
            wanted = last_within(budget.limit - (each.bytes - size))
        else:
            wanted = last_within(size * each.value(budget.kind) / budget.limit)
        if beyond - found.place <= 1 or wanted == found.place == place:
            return
        place = min(max(wanted, found.place + 1), beyond - 1)
    if found.place < 0 and keeps(measure(0)):
        found.place = 0
