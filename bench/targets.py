"""What the project wants to reach on an H200, what it reached, and where the limit lies.

Computed from the rows alone. A row of a CPU, a missing row and a wrong result reach nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gptopt.bench.contenders import (
    BOUND,
    COMPILED,
    CUDNN,
    DETERMINISTIC,
    EAGER,
    FLASH,
    OURS,
)
from gptopt.bench.records import Row

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """One line of the table. reached: a figure with its unit, or why there is none."""

    what: str
    target: str
    reached: str
    limit: str
    met: bool | None  # None: not measured

    def as_json(self) -> dict[str, Any]:
        """The line as it stands in targets.json."""
        return asdict(self)


def targets(rows: Sequence[Row], machine: Row | None) -> list[Target]:
    """The whole table; `machine` is the line of the rows' file, None where nothing was measured."""
    found = _Rows([row for row in rows if row.get("device") == "cuda"])
    product = _product(machine)
    return [line for part in _PARTS for line in part(found, product)]


@dataclass(frozen=True)
class _Goal:
    what: str
    bound: float
    unit: str
    sense: Literal["at least", "at most"] = "at least"

    def line(self, reached: "Reached", limit: str) -> Target:
        sign = ">=" if self.sense == "at least" else "<="
        target = f"{sign} {_figure(self.bound)}{self.unit}"
        if isinstance(reached, str):
            return Target(
                self.what, target, reached, limit, None if reached == NOT_MEASURED else False
            )
        met = reached >= self.bound if self.sense == "at least" else reached <= self.bound
        return Target(self.what, target, f"{_figure(reached)}{self.unit}", limit, met)


Reached = float | str  # a figure, or why there is none
Part = Callable[["_Rows", str], list[Target]]


class _Rows:
    """Rows of a GPU, found by what they are about."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def one(self, contender: str, **about: Any) -> Row | str:
        """The row, or why there is none: not measured, or wrong."""
        for row in self._rows:
            if row["contender"] == contender and all(row.get(k) == v for k, v in about.items()):
                if row.get("error"):
                    return f"failed: {row['error']}"
                if row.get("correct") or row.get("bound"):
                    return row
                return "wrong result" if row.get("correct") is False else "not checked"
        return NOT_MEASURED

    def cases(self, operator: str, **sizes: int) -> list[str]:
        """Names of the target cases of an operator that were measured, ours or not."""
        names = [
            str(row["case"])
            for row in self._rows
            if row.get("operator") == operator and row.get("target")
            and all(row["sizes"].get(k) == v for k, v in sizes.items())
        ]  # fmt: skip
        return list(dict.fromkeys(names))

    def value(self, read: Callable[[Row], float], contender: str, **about: Any) -> Reached:
        """One figure of a row."""
        row = self.one(contender, **about)
        return row if isinstance(row, str) else read(row)

    def ratio(self, read: Callable[[Row], float], above: str, below: str, **about: Any) -> Reached:
        """A figure of one contender over that of another."""
        parts = [self.value(read, name, **about) for name in (above, below)]
        for name, part in zip((above, below), parts, strict=True):
            if isinstance(part, str):
                return part if part == NOT_MEASURED else f"{name}: {part}"
        first, second = (float(part) for part in parts)
        return first / second


def _worst(reached: Sequence[Reached], sense: str) -> Reached:
    """The figure that decides, or the first reason why there is none."""
    for one in reached:
        if isinstance(one, str):
            return one
    figures = [float(one) for one in reached]
    if not figures:
        return NOT_MEASURED
    return min(figures) if sense == "at least" else max(figures)


def _cold_ms(row: Row) -> float:
    return float(row["cold"]["median_ms"])


def _number(key: str) -> Callable[[Row], float]:
    return lambda row: float(row[key])


def _attention(rows: _Rows, product: str) -> list[Target]:
    d64 = "attention d64 causal forward"
    short = {"operator": "attention", "case": "d64 causal T 1024", "phase": "forward"}
    long = {"operator": "attention", "case": "d64 causal T 4096", "phase": "forward"}
    wide = {"operator": "attention", "case": "d128 causal T 8192", "phase": "forward"}
    back = {**wide, "phase": "backward"}
    tflops = _number("tflops")
    return [
        _Goal(f"{d64}, T 1024, over SDPA flash", 1.25, "x").line(
            rows.ratio(_cold_ms, FLASH, OURS, **short), ""
        ),
        _Goal(f"{d64}, T 1024, over SDPA cuDNN", 1.05, "x").line(
            rows.ratio(_cold_ms, CUDNN, OURS, **short), ""
        ),
        _Goal(f"{d64}, T 4096", 430, " TFLOP/s").line(
            rows.value(tflops, OURS, **long), "494 without overlap"
        ),
        _Goal("attention d128 causal forward, T 8192", 620, " TFLOP/s").line(
            rows.value(tflops, OURS, **wide), product
        ),
        _Goal("attention d128 causal backward, T 8192, over SDPA cuDNN", 1.0, "x").line(
            rows.ratio(_cold_ms, CUDNN, OURS, **back), ""
        ),
        _Goal("attention deterministic backward over the fast one", 1.2, "x", "at most").line(
            rows.ratio(_cold_ms, DETERMINISTIC, OURS, **back), "1x"
        ),
    ]


def _layernorm(rows: _Rows, product: str) -> list[Target]:
    big = [
        case
        for case in rows.cases(
            "layernorm",
        )
        if " 4096 x 768" not in case
    ]
    lines = []
    for phase, bound in (("forward", 85.0), ("backward", 75.0)):
        shares = [
            rows.value(lambda row: 100 * float(row["share_of_limit"]), OURS,
                       operator="layernorm", case=case, phase=phase)
            for case in big
        ]  # fmt: skip
        lines.append(
            _Goal(f"layernorm with residual, {phase}, of the copy bandwidth", bound, " %").line(
                _worst(shares, "at least"), "100 %"
            )
        )
    about = {"operator": "layernorm", "case": "layer 4096 x 768 + residual", "phase": "full"}
    lines.append(
        _Goal("layernorm wall time of an eager call, 4096 x 768, over torch", 1.0, "x",
              "at most").line(rows.ratio(_number("wall_ms"), OURS, EAGER, **about), "")
    )  # fmt: skip
    return lines


def _cross_entropy(rows: _Rows, product: str) -> list[Target]:
    about = [
        {"operator": "cross_entropy", "case": case, "phase": "full"}
        for case in rows.cases("cross_entropy")
    ]
    times = [rows.ratio(_cold_ms, OURS, BOUND, **one) for one in about]
    memory = [rows.ratio(_number("peak_bytes"), OURS, EAGER, **one) for one in about]
    return [
        _Goal("cross_entropy over its three products alone", 1.05, "x", "at most").line(
            _worst(times, "at most"), "1x"
        ),
        _Goal("cross_entropy memory over eager's", 0.125, "x", "at most").line(
            _worst(memory, "at most"), ""
        ),
    ]


def _ffn(rows: _Rows, product: str) -> list[Target]:
    lines = []
    for peer, bound in ((EAGER, 1.15), (COMPILED, 1.05)):
        ratios = [
            rows.ratio(_cold_ms, peer, OURS, operator="ffn", case=case, phase="full")
            for case in rows.cases("ffn")
        ]
        limits = [
            rows.ratio(_cold_ms, peer, BOUND, operator="ffn", case=case, phase="full")
            for case in rows.cases("ffn")
        ]
        limit = _worst(limits, "at least")
        lines.append(
            _Goal(f"ffn forward + backward over {peer}", bound, "x").line(
                _worst(ratios, "at least"),
                f"{_figure(limit)}x, products alone" if isinstance(limit, float) else "",
            )
        )
    return lines


def _training(rows: _Rows, product: str) -> list[Target]:
    from gptopt.bench.training import NANOGPT, OURS_COMPILED

    about = {"bench": "training"}
    rate, memory = _number("tokens_per_s"), _number("peak_bytes")
    # Both are ours: the faster one counts, for its memory too.
    eager, compiled = (rows.value(rate, name, **about) for name in (OURS, OURS_COMPILED))
    faster = isinstance(compiled, float) and (isinstance(eager, str) or compiled > eager)
    own = OURS_COMPILED if faster else OURS
    mfu = rows.value(_number("mfu"), own, **about)
    speed = rows.value(rate, own, **about)
    whole = "" if isinstance(mfu, str) or isinstance(speed, str) else f"{speed / mfu:,.0f} tokens/s"
    return [
        _Goal("GPT-2 124M training", 600_000, " tokens/s").line(speed, whole),
        _Goal("training speed over nanoGPT + torch.compile", 1.25, "x").line(
            rows.ratio(rate, own, NANOGPT, **about), ""
        ),
        _Goal("training memory over nanoGPT + torch.compile", 0.6, "x", "at most").line(
            rows.ratio(memory, own, NANOGPT, **about), ""
        ),
    ]


def _generate(rows: _Rows, product: str) -> list[Target]:
    about = {"bench": "generate", "batch": 1}
    limit = rows.value(_number("limit_tokens_per_s"), OURS, **about)
    return [
        _Goal("GPT-2 124M decoding, batch 1", 9000, " tokens/s").line(
            rows.value(_number("tokens_per_s"), OURS, **about),
            "" if isinstance(limit, str) else f"{limit:,.0f} tokens/s",
        )
    ]


# In the order of worth.
_PARTS: tuple[Part, ...] = (_cross_entropy, _layernorm, _training, _attention, _ffn, _generate)


def _product(machine: Row | None) -> str:
    """The measured rate of a bfloat16 product, as a limit."""
    rate = machine and machine["limits"]["flops_per_s"].get("bfloat16")
    return f"{rate / 1e12:.0f}, a product" if rate else ""


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
