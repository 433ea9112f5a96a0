"""The report's pictures, as SVG texts: drawn with matplotlib, without a display."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from gptopt.bench.records import Row

INK, MUTED, GRID = "#1c2b33", "#6b7b83", "#e4e9ec"
OWN = "#0b7a75"
_COLOURS = {
    "gptopt": OWN,
    "gptopt deterministic": "#7cc4bd",
    "gptopt + torch.compile": "#4fa39b",
    "SDPA flash": "#e07a3f",
    "SDPA cuDNN": "#b5482a",
    "FlexAttention": "#c9a227",
    "Liger": "#8a5a9e",
    "torch.compile": "#4a78b5",
    "reference + torch.compile": "#4a78b5",
    "eager": "#9fb0b9",
    "reference eager": "#9fb0b9",
    "nanoGPT + torch.compile": "#e07a3f",
    "nanoGPT": "#e07a3f",
    "products alone": "#ffffff",
}
_MARKS = {"forward": "o", "backward": "s", "full": "D"}
_WIDTH = 10.0

Value = Callable[[Row], float]


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure in the report's dress."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10}):
        made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def svg(drawn: Any) -> bytes:
    """A figure as an SVG file, its letters as paths, so that it looks alike everywhere."""
    from matplotlib import rc_context

    text = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "gptopt"}):
        drawn.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def bars(
    rows: Sequence[Row],
    columns: Sequence[tuple[str, Callable[[Row], bool]]],
    value: Value,
    unit: str,
    limit: Value | None = None,
) -> Any:
    """Horizontal bars: a block per case, a bar per contender, a column per phase or figure.

    A wrong result is hatched and says so; the dashed mark is the limit of this machine.
    """
    from matplotlib.ticker import MaxNLocator

    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    blocks = [(case, _names(rows, case)) for case in cases]
    lines = sum(len(names) for _, names in blocks) + 1.8 * len(blocks)
    drawn = figure(_WIDTH, 0.7 + 0.235 * lines)
    every = drawn.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (title, belongs) in zip(every, columns, strict=True):
        shown = [row for row in rows if belongs(row)]
        longest = max((value(row) for row in shown), default=1.0)
        limits = [limit(row) for row in shown if limit] or [0.0]
        ends = [end for end in limits if end <= 2.2 * longest]  # a far limit is told, not drawn
        right = 1.28 * max(longest, *ends, 0.0) if ends else 1.28 * longest
        place, ticks = 0.0, []
        for case, names in blocks:
            axes.text(0, place, case, ha="left", va="center", color=INK, weight="bold", size=9)
            place += 1.0
            top = place
            for name in names:
                row = next((r for r in shown if r["case"] == case and r["contender"] == name), None)
                ticks.append((place, name))
                if row is not None:
                    _bar(axes, place, row, value, right, unit)
                place += 1.0
            _limit_mark(axes, [r for r in shown if r["case"] == case], limit, top, place, right)
            place += 0.8
        axes.set(xlim=(0, right), ylim=(place - 0.6, -0.8))
        axes.set_title(title, loc="left", color=INK, size=11, pad=8)
        axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
        axes.tick_params(axis="x", colors=MUTED, labelsize=8)
        axes.set_xlabel(unit, color=MUTED, size=9)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
        axes.grid(axis="x", color=GRID)
        _undress(axes)
    return drawn


def _names(rows: Sequence[Row], case: str) -> list[str]:
    found = {str(row["contender"]) for row in rows if row["case"] == case}
    order = list(_COLOURS)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _bar(axes: Any, place: float, row: Row, value: Value, right: float, unit: str) -> None:
    name, length = str(row["contender"]), value(row)
    wrong = row.get("correct") is False
    colour = "#f3f3f3" if wrong else _COLOURS.get(name, MUTED)
    outline = "#b00020" if wrong else MUTED if row.get("bound") else colour
    end = length
    axes.barh(
        place, length, height=0.74, color=colour, edgecolor=outline, zorder=2,
        linewidth=1.0, linestyle="--" if row.get("bound") else "-", hatch="////" if wrong else "",
    )  # fmt: skip
    spread = row.get("cold") or row.get("step")
    if spread and spread["median_ms"]:
        low, high = (
            length * spread["median_ms"] / max(spread[q], 1e-9) for q in ("q3_ms", "q1_ms")
        )
        high = min(high, right)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.1, zorder=3)
        end = max(end, high)
    said = "wrong" if wrong else _short(length)
    axes.text(
        end + 0.015 * right, place, said, va="center", size=8.5, zorder=4,
        color="#b00020" if wrong else INK,
        weight="bold" if name.startswith("gptopt") else "normal",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
    )  # fmt: skip


def _limit_mark(
    axes: Any, rows: Sequence[Row], limit: Value | None, top: float, bottom: float, right: float
) -> None:
    if limit is None or not rows:
        return
    at = limit(rows[0])
    if at <= right:
        axes.plot([at, at], [top - 0.55, bottom - 0.45], color="#b00020", ls=(0, (4, 2)), lw=1.2)
    else:
        axes.text(
            right, bottom - 0.3, f"limit {_short(at)} >", ha="right", va="center",
            color="#b00020", size=8,
        )  # fmt: skip


def distances(rows: Sequence[Row]) -> Any:
    """A line per case: how much of this machine's limit each contender reaches."""
    labels = list(dict.fromkeys((row["operator"], row["case"]) for row in rows))
    drawn = figure(_WIDTH, 1.1 + 0.36 * len(labels))
    axes = drawn.subplots()
    seen: dict[str, Any] = {}
    for place, (operator, case) in enumerate(labels):
        here = [row for row in rows if (row["operator"], row["case"]) == (operator, case)]
        shares = [100 * row["share_of_limit"] for row in here]
        axes.plot([min(shares), max(shares)], [place] * 2, color=GRID, linewidth=3, zorder=1)
        for row in sorted(here, key=lambda row: row["contender"] == "gptopt"):
            name = str(row["contender"])
            own = name == "gptopt"
            dot = axes.scatter(
                100 * row["share_of_limit"], place, s=95 if own else 46, zorder=3 + own,
                color=_COLOURS.get(name, MUTED), edgecolor="white" if not row["bound"] else MUTED,
                linewidth=0.8,
            )  # fmt: skip
            seen.setdefault(name, dot)
    axes.axvline(100, color="#b00020", linestyle=(0, (4, 2)), linewidth=1.2)
    axes.set_yticks(range(len(labels)), [f"{operator}  {case}" for operator, case in labels])
    axes.set(xlim=(0, None), ylim=(len(labels) - 0.5, -0.5))
    axes.set_xlabel("% of what this machine's copy bandwidth and product rate allow", color=MUTED)
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
    axes.tick_params(axis="x", colors=MUTED)
    axes.grid(axis="x", color=GRID)
    _undress(axes)
    ordered = [name for name in _COLOURS if name in seen]
    drawn.legend(
        [seen[name] for name in ordered], ordered, loc="outside upper left", frameon=False,
        ncols=min(5, len(ordered)), fontsize=9, handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip
    return drawn


def roofline(rows: Sequence[Row], limits: Row, dtype: str) -> Any:
    """Operations per second over operations per byte, under the two roofs that were measured."""
    from matplotlib.lines import Line2D

    drawn = figure(_WIDTH, 5.2)
    axes = drawn.subplots()
    rate = limits["flops_per_s"].get(dtype) or max(limits["flops_per_s"].values())
    bandwidth, ridge = limits["bytes_per_s"], rate / limits["bytes_per_s"]
    intensity = [row["flops"] / row["bytes"] for row in rows]
    left, right = 0.5 * min(intensity), 2.0 * max(*intensity, ridge)
    axes.plot([left, ridge, right], [bandwidth * left / 1e12, rate / 1e12, rate / 1e12],
              color=INK, linewidth=1.8, zorder=2)  # fmt: skip
    axes.fill_between([left, ridge, right], [bandwidth * left / 1e12, rate / 1e12, rate / 1e12],
                      [1e9] * 3, color="#f6f8f9", zorder=0)  # fmt: skip
    own = [row for row in rows if row["contender"] == "gptopt"]
    peers = [row for row in rows if row["contender"] != "gptopt"]
    for group, style in (
        (peers, {"s": 30, "alpha": 0.8, "linewidth": 0, "zorder": 3}),
        (own, {"s": 78, "linewidth": 0.9, "edgecolor": "white", "zorder": 4}),
    ):
        for row in group:
            axes.scatter(
                row["flops"] / row["bytes"], row["tflops"], marker=_MARKS[row["phase"]],
                color=_COLOURS.get(row["contender"], MUTED), **style,
            )  # fmt: skip
    _name_columns(axes, rows)
    lowest = min(min(row["tflops"] for row in rows), bandwidth * left / 1e12)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(0.4 * lowest, 2.6e-12 * rate))
    axes.set_xlabel("operations per byte that has to move", color=MUTED)
    axes.set_ylabel("TFLOP/s", color=MUTED)
    axes.text(right * 0.93, 1.12e-12 * rate, f"product rate {_short(rate / 1e12)} TFLOP/s",
              ha="right", va="bottom", color=INK, size=9)  # fmt: skip
    axes.text(0.02, 0.96, f"copy bandwidth {_short(bandwidth / 1e9)} GB/s (the slope)",
              transform=axes.transAxes, va="top", color=INK, size=9)  # fmt: skip
    axes.tick_params(colors=MUTED)
    axes.grid(color=GRID, which="major")
    axes.set_axisbelow(True)
    _undress(axes)
    names = [name for name in _COLOURS if any(row["contender"] == name for row in rows)]
    marks = [
        Line2D([], [], marker="o", linestyle="", color=_COLOURS[name], label=name) for name in names
    ] + [
        Line2D([], [], marker=mark, linestyle="", color=MUTED, markerfacecolor="none", label=phase)
        for phase, mark in _MARKS.items() if any(row["phase"] == phase for row in rows)
    ]  # fmt: skip
    drawn.legend(handles=marks, loc="outside lower center", frameon=False, fontsize=9,
                 ncols=min(6, len(marks)), handletextpad=0.2, columnspacing=1.4)  # fmt: skip
    return drawn


def _name_columns(axes: Any, rows: Sequence[Row]) -> None:
    """Each operator's name once, under the lowest of its points; neighbours share a label."""
    lowest: dict[str, tuple[float, float]] = {}
    for row in rows:
        point = (row["flops"] / row["bytes"], row["tflops"])
        if row["operator"] not in lowest or point[1] < lowest[row["operator"]][1]:
            lowest[row["operator"]] = point
    labels: list[tuple[list[str], float, float]] = []
    for operator, (x, y) in sorted(lowest.items(), key=lambda item: item[1]):
        if labels and x < 4 * labels[-1][1] and 0.2 < y / labels[-1][2] < 5:
            names, first, least = labels[-1]
            labels[-1] = ([*names, operator], first, min(least, y))
        else:
            labels.append(([operator], x, y))
    for names, x, y in labels:
        axes.annotate(
            "\n".join(names), (x, y), xytext=(0, -9), textcoords="offset points",
            ha="center", va="top", color=INK, size=8.5,
        )  # fmt: skip


def _undress(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.set_axisbelow(True)


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
