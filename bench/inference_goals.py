"""What `gptopt bench inference` is to reach, as data, and how far the rows of a run are from it.

Each goal takes the best of our contenders whose precision may meet it, and names it: so the table
says which preset meets which goal, and by how much the others are missed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]

_SHORT, _LONG = "decode 32+128", "decode 896+128"


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        what: in words.
        precisions: those of our files that may meet it.
        measure: "speed": ours over that of the fastest of `peers` in a workload, at least
            `target`; "floor": share of the floor in a workload, at least; "disk_mb", "peak_mib": of
            our file, at most.
    """

    what: str
    precisions: tuple[str, ...]
    target: float
    workload: str = ""
    peers: tuple[str, ...] = ()
    measure: Literal["speed", "floor", "disk_mb", "peak_mib"] = "speed"

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.measure in ("disk_mb", "peak_mib")


def _both(what: str, precision: str, short: float, long: float, *peers: str) -> Iterator[Goal]:
    """The same goal behind a short and a long prompt."""
    yield Goal(what, (precision,), short, _SHORT, peers)
    yield Goal(what, (precision,), long, _LONG, peers)


def _floor(name: str, *precisions: str) -> Iterator[Goal]:
    for workload in (_SHORT, _LONG):
        yield Goal(f"share of the floor, {name}", precisions, 0.75, workload, measure="floor")


_FOUR = ("q4", "q4-fast")
_ALL_INT = ("llamacpp q8_0", "llamacpp q4_0", "genai int4", "optimum int8", "ctranslate2 int8",
            "openvino int8", "openvino int4")  # fmt: skip
_ALL_FP32 = ("llamacpp f32", "ctranslate2 float32", "optimum fp32", "openvino fp32")
_OURS = ("fp32", "q8", *_FOUR)

GOALS: tuple[Goal, ...] = (
    *_both("q4", "q4", 1.25, 1.4, "llamacpp q4_0"),
    *_both("q4, the fastest preset", "q4-fast", 1.5, 1.7, "llamacpp q4_0"),
    *_both("q4, the fastest preset", "q4-fast", 1.5, 1.5, "genai int4"),
    *_both("q8", "q8", 1.2, 1.2, "llamacpp q8_0"),
    *_both("q8", "q8", 2.5, 2.5, "ctranslate2 int8"),
    *_both("q8", "q8", 1.8, 1.8, "optimum int8"),
    *_both("fp32", "fp32", 1.05, 1.05, *_ALL_FP32),
    *_both("fp32", "fp32", 2.0, 2.0, "torch float32"),
    Goal("prompt of 512 tokens", (*_FOUR, "q8"), 1.0, "prefill 512", ("openvino int4",)),
    Goal("prompt of 512 tokens", (*_FOUR, "q8"), 2.0, "prefill 512", ("llamacpp q4_0",)),
    Goal("batch of 8", _OURS, 1.1, "batch 8 decode 32+64", _ALL_INT),
    Goal("size of q4", ("q4",), 80.0, measure="disk_mb"),
    Goal("memory of q4", ("q4",), 240.0, measure="peak_mib"),
    *_floor("q4", *_FOUR),
    *_floor("q8", "q8"),
    *_floor("fp32", "fp32"),
    Goal("load and first token, q4", _FOUR, 1.0, "load + first token", ("llamacpp q4_0",)),
)  # fmt: skip


def reached(rows: Sequence[Row], summary: Sequence[Row]) -> list[Row]:
    """A line for each goal that this run measured.

    Returns:
        goal, workload, over (the fastest of the peers), target, value, by (our best contender),
        reached, and short_of: the share that is missing, 0 where it is reached.
    """
    run = _Run(rows, summary)
    lines = []
    for goal in GOALS:
        over = max(goal.peers, key=lambda peer: run.speed(goal, peer), default=None)
        values = {name: run.value(goal, name, over) for name in run.ours(goal)}
        values = {name: value for name, value in values.items() if value}
        if not values:
            continue
        by = (min if goal.at_most else max)(values, key=lambda name: values[name])
        share = goal.target / values[by] if goal.at_most else values[by] / goal.target
        lines.append(
            {"goal": goal.what, "workload": goal.workload or goal.measure, "over": over,
             "target": goal.target, "value": values[by], "by": by, "reached": share >= 1,
             "short_of": max(0.0, 1 - share)}
        )  # fmt: skip
    return lines


class _Run:
    """What a run found, by contender."""

    def __init__(self, rows: Sequence[Row], summary: Sequence[Row]) -> None:
        self.lines = {(line["workload"], line["contender"]): line for line in summary}
        self.loads = {row["contender"]: row for row in rows if row.get("kind") == "load"}
        self.memory = {row["contender"]: row for row in rows if row.get("kind") == "memory"}

    def ours(self, goal: Goal) -> list[str]:
        """Our contenders that may meet a goal: gptopt FOLDER PRECISION."""
        mine = [name for name in self.loads if name.startswith("gptopt ")]
        return [name for name in mine if name.split()[-1] in goal.precisions]

    def value(self, goal: Goal, name: str, over: str | None) -> float:
        """What a goal asks for, of one contender; 0 where it was not measured."""
        if goal.measure == "disk_mb":
            return float(self.loads[name].get("disk_bytes", 0)) / 1e6
        if goal.measure == "peak_mib":
            return float(self.memory.get(name, {}).get("peak_mib") or 0)
        if goal.measure == "floor":
            return float(self.lines.get((goal.workload, name), {}).get("floor_share", 0))
        best = self.speed(goal, over or "")
        return self.speed(goal, name) / best if best else 0.0

    def speed(self, goal: Goal, name: str) -> float:
        """Tokens per second, or texts per second where milliseconds were measured."""
        line = self.lines.get((goal.workload, name))
        if line is None:
            return 0.0
        return float(line["value"] if line["unit"] == "tokens/s" else 1e3 / line["value"])


def table(lines: Sequence[Row]) -> list[str]:
    """The lines as Markdown."""
    text = ["| goal | measured | over | to reach | found | by | |", "|---" * 7 + "|"]
    for line in lines:
        form = {"disk_mb": "{:.1f} MB", "peak_mib": "{:.0f} MiB"}.get(line["workload"], "{:.2f}")
        missing = 100 * line["short_of"]
        state = "reached" if line["reached"] else f"{missing:.{0 if missing >= 1 else 1}f}% short"
        cells = [line["goal"], line["workload"], line["over"] or "", form.format(line["target"]),
                 form.format(line["value"]), line["by"].removeprefix("gptopt "), state]  # fmt: skip
        text.append("| " + " | ".join(cells) + " |")
    return text
