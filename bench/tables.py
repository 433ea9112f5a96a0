"""The report's figures to look up: folded away, one table per section."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

from gptopt.bench.records import Row

_COLUMNS = (
    "case", "batch", "phase", "contender", "right", "median ms", "quartiles", "warm ms", "wall ms",
    "TFLOP/s", "GB/s", "tokens/s", "MFU", "of limit", "memory MiB", "over eager",
)  # fmt: skip
# What is never told of a wrong result.
_OF_RIGHT_RESULTS = ("tflops", "gb_per_s", "tokens_per_s", "mfu", "share_of_limit", "speedup")


def details(measured: Sequence[Row], failed: Sequence[Row]) -> Iterator[str]:
    """Every figure of a section, and who did not take part and why."""
    if measured:
        cells = [_cells(row) for row in measured]
        shown = [name for name in _COLUMNS if any(row.get(name) for row in cells)]
        yield "<details><summary>All figures</summary><div class=scroll><table class=figures>"
        yield "<thead><tr>" + "".join(f"<th>{name}</th>" for name in shown) + "</tr></thead><tbody>"
        for row, cell in zip(measured, cells, strict=True):
            style = " class=wrong" if row.get("correct") is False else ""
            values = "".join(f"<td>{html.escape(cell.get(name, ''))}</td>" for name in shown)
            yield f"<tr{style}>{values}</tr>"
        yield "</tbody></table></div></details>"
    if failed:
        # One line for a reason, however many cases it kept from being measured.
        reasons = dict.fromkeys((row["contender"] or "all", row["error"]) for row in failed)
        yield "<details><summary>Not measured</summary><ul class=failed>"
        for name, why in reasons:
            yield f"<li><b>{html.escape(str(name))}</b> {html.escape(str(why))}</li>"
        yield "</ul></details>"


def spread_note() -> str:
    """How to read a row."""
    return (
        "Contenders take turns in one process, in orders in which nobody profits from a place or a"
        " predecessor. Bars are medians after the L2 cache was flushed, black lines the quartiles."
        " Device times hold no launch gaps: the device waits until all kernels of a call are"
        " queued; the wall time is that of one lone eager call. A result is right where its error"
        " against float64 is at most twice that of plain PyTorch in the same precision plus one"
        " rounding band, for outputs and all gradients. No speed-up is told of a wrong result."
    )


def _cells(row: Row) -> dict[str, str]:
    spread: Row = row.get("cold") or row["step"]
    right: Any = row.get("correct")
    said = {True: "yes", False: "WRONG", None: "bound" if row.get("bound") else "not checked"}[
        right
    ]
    found = {
        "case": str(row["case"]),
        "batch": str(row.get("batch", "")),
        "phase": str(row.get("phase") or ""),
        "contender": str(row["contender"]),
        "right": said,
        "median ms": f"{spread['median_ms']:.4g}",
        "quartiles": f"{spread['q1_ms']:.4g} to {spread['q3_ms']:.4g} ({spread['samples']})",
    }
    numbers = {
        "wall ms": ("wall_ms", 1.0, ".4g"),
        "TFLOP/s": ("tflops", 1.0, ".3g"),
        "GB/s": ("gb_per_s", 1.0, ".4g"),
        "tokens/s": ("tokens_per_s", 1.0, ",.0f"),
        "MFU": ("mfu", 100.0, ".1f"),
        "of limit": ("share_of_limit", 100.0, ".1f"),
        "memory MiB": ("peak_bytes", 2.0**-20, ",.0f"),
        "over eager": ("speedup", 1.0, ".2f"),
    }
    suffix = {"MFU": " %", "of limit": " %", "over eager": "x"}
    for name, (key, scale, form) in numbers.items():
        if row.get(key) is not None and not (right is False and key in _OF_RIGHT_RESULTS):
            found[name] = format(scale * float(row[key]), form) + suffix.get(name, "")
    if row.get("warm"):
        found["warm ms"] = f"{row['warm']['median_ms']:.4g}"
    return found
