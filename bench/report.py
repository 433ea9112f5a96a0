"""One page and a short summary of all rows in a folder: what to look at, then what to look up.

python -P -m gptopt.bench.report FOLDER      draws the page again from the rows
"""

import base64
import html
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from gptopt.bench import charts
from gptopt.bench.contenders import BOUND, OURS
from gptopt.bench.records import FILES, Row, device_name, read_rows
from gptopt.bench.tables import details, spread_note
from gptopt.bench.targets import Target, targets

PAGE, SUMMARY, TARGETS = "report.html", "report.md", "targets.json"
_TITLES = {
    "cross_entropy": "linear head + cross-entropy, without logits in memory",
    "layernorm": "norm, residual sum and dropout in one pass",
    "attention": "attention",
    "ffn": "linear + bias + activation",
    "attention_decode": "one new token against a cache",
    "rotary": "rotary positions",
}
_MEMORY_BOUND = ("layernorm", "attention_decode", "rotary")
MACHINERY = (
    "Measured on a CPU, on tiny shapes: this page shows that the bench works. It says nothing"
    " about the kernels."
)

_CAPTION = "Longer is faster. Dashed red: what this machine allows. Black: quartiles."

Fragments = Iterator[str]


def write_report(folder: Path) -> list[dict[str, Any]]:
    """Write report.html, report.md and targets.json from the rows in a folder; the targets.

    Rows of different machines do not mix: the kernels' file decides, or the first there is.

    Raises:
        UserError: a result file is not one.
    """
    found = {name: read_rows(folder / f"{name}.jsonl") for name in FILES}
    machines = [machine for machine, _ in found.values() if machine is not None]
    if not machines:
        return []
    same = {
        name: rows if machine and device_name(machine) == device_name(machines[0]) else []
        for name, (machine, rows) in found.items()
    }
    table = targets([row for rows in same.values() for row in rows], machines[0])
    page = "\n".join(_page(machines, same, table))
    (folder / PAGE).write_text(page, encoding="utf-8")
    (folder / SUMMARY).write_text("\n".join(_summary(machines, same, table)), encoding="utf-8")
    as_json = [line.as_json() for line in table]
    (folder / TARGETS).write_text(json.dumps(as_json, indent=2) + "\n", encoding="utf-8")
    return as_json


def _page(machines: list[Row], found: dict[str, list[Row]], table: list[Target]) -> Fragments:
    style = files("gptopt.bench").joinpath("report.css").read_text(encoding="utf-8")
    name = html.escape(device_name(machines[0]))
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>gptopt bench: {name}</title><style>{style}</style></head><body><main>"
    yield f"<header><p class=kicker>gptopt bench</p><h1>{name}</h1>{_facts(machines)}</header>"
    if machines[0]["gpu"] is None:
        yield f"<p class=machinery>{html.escape(MACHINERY)}</p>"
    yield from _section("targets", "Targets", _targets(table))
    kernels = [row for row in found["kernels"] if "cold" in row]
    if kernels:
        yield from _section("limits", "How far from the limit", _overview(kernels, machines[0]))
    for operator, title in _TITLES.items():
        rows = [row for row in found["kernels"] if row.get("operator") == operator]
        if rows:
            yield from _section(operator, f"{operator} <small>{title}</small>", _operator(rows))
    if found["training"]:
        yield from _section("training", "A whole training step", _training(found["training"]))
    if found["generate"]:
        yield from _section("generate", "Generation", _generation(found["generate"]))
    yield from _section("made", "How this was made", _made(machines))
    yield "</main></body></html>\n"


def _section(anchor: str, title: str, content: Fragments) -> Fragments:
    yield f'<section id="{anchor}"><h2>{title}</h2>'
    yield from content
    yield "</section>"


def _facts(machines: list[Row]) -> str:
    machine, gpu = machines[0]["machine"], machines[0]["gpu"] or {}
    rate = machines[0]["limits"]["flops_per_s"]
    dtype = "bfloat16" if "bfloat16" in rate else "float32"
    facts = {
        "copies": f"{machines[0]['limits']['bytes_per_s'] / 1e9:,.4g} GB/s",
        f"multiplies {dtype}": f"{rate[dtype] / 1e12:,.3g} TFLOP/s",
        "torch": machine["versions"].get("torch"),
        "triton": machine["versions"].get("triton"),
        "driver": gpu.get("driver_version"),
        "commit": machine["commit"],
        "date": machines[-1]["date"].partition("T")[0],
    }
    items = [
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for key, value in facts.items()
        if value
    ]
    return f"<dl class=facts>{''.join(items)}</dl>"


def _targets(table: list[Target]) -> Fragments:
    measured = [line for line in table if line.met is not None]
    met = sum(bool(line.met) for line in measured)
    if measured:
        rest = len(table) - len(measured)
        yield f"<p>{met} of {len(table)} are reached, {rest} not measured.</p>"
    else:
        yield "<p>None is measured here: they speak of an H200.</p>"
    yield "<table class=targets><thead><tr><th></th><th>target</th><th>wanted</th><th>reached</th>"
    yield "<th>limit</th></tr></thead><tbody>"
    for line in table:
        state = {True: "met", False: "missed", None: "open"}[line.met]
        sign = {True: "&#10003;", False: "&#10007;", None: "&middot;"}[line.met]
        wanted = html.escape(line.target).replace("&gt;=", "&ge;").replace("&lt;=", "&le;")
        yield (
            f"<tr class={state}><td class=sign>{sign}</td><td>{html.escape(line.what)}</td>"
            f"<td>{wanted}</td><td class=reached>{html.escape(line.reached)}</td>"
            f"<td>{html.escape(line.limit)}</td></tr>"
        )
    yield "</tbody></table>"


def _overview(rows: list[Row], machine: Row) -> Fragments:
    right = [row for row in rows if row.get("correct") is not False]
    main = [row for row in right if row["phase"] == _main_phase(right, row)]
    if main:
        yield "<p>Each dot is one contender; the dashed line is the least time that moving the "
        yield "bytes or doing the products takes on this machine. Forward and backward together "
        yield "where there are both. Wrong results are left out.</p>"
        yield _chart("distance from the limit", charts.distances(main))
        dtype = statistics.mode(row["dtype"] for row in main)
        shown = [row for row in main if not row["bound"]]
        yield "<h3>Roofline</h3>"
        yield _chart("roofline", charts.roofline(shown, machine["limits"], dtype))


def _main_phase(rows: Sequence[Row], one: Row) -> str:
    same = [row for row in rows if (row["operator"], row["case"]) == (one["operator"], one["case"])]
    return "full" if any(row["phase"] == "full" for row in same) else "forward"


def _operator(rows: list[Row]) -> Fragments:
    measured = [row for row in rows if "cold" in row]
    failed = [row for row in rows if row.get("error")]
    if measured:
        key, unit, scale = _unit(str(rows[0]["operator"]))
        phases = [
            p for p in ("forward", "backward", "full") if any(r["phase"] == p for r in measured)
        ]
        columns: list[tuple[str, Callable[[Row], bool]]] = [
            (_phase_title(phase), lambda row, phase=phase: row["phase"] == phase)  # type: ignore[misc]  # bound
            for phase in phases
        ]
        drawn = charts.bars(
            measured, columns, lambda row: scale * float(row[key]), unit,
            limit=lambda row: scale * float(row[key]) / float(row["share_of_limit"]),
        )  # fmt: skip
        yield f"<p>{html.escape(' '.join(_sentences(measured)))}</p>"
        yield _chart(f"{rows[0]['operator']}: speed of each contender", drawn, _CAPTION)
    yield from details(measured, failed)


def _unit(operator: str) -> tuple[str, str, float]:
    return ("gb_per_s", "GB/s", 1.0) if operator in _MEMORY_BOUND else ("tflops", "TFLOP/s", 1.0)


def _phase_title(phase: str) -> str:
    return {"full": "forward + backward"}.get(phase, phase)


def _sentences(rows: Sequence[Row]) -> Iterator[str]:
    """Ours beside the fastest right peer, in words; nothing of a wrong result."""
    wrong = sorted({row["contender"] for row in rows if row.get("correct") is False})
    for phase in ("forward", "backward", "full"):
        ratios = []
        for own in rows:
            if own["contender"] != OURS or own["phase"] != phase or not own.get("correct"):
                continue
            peers = [
                row["cold"]["median_ms"] for row in rows
                if row["phase"] == phase and row["case"] == own["case"] and row.get("correct")
                and not str(row["contender"]).startswith(OURS)
            ]  # fmt: skip
            if peers:
                ratios.append(min(peers) / own["cold"]["median_ms"])
        if ratios:
            least, most = min(ratios), max(ratios)
            figures = f"{least:.2f}x" if least == most else f"{least:.2f}x to {most:.2f}x"
            yield f"{_phase_title(phase).capitalize()}: {figures} the fastest right peer's speed."
    if wrong:
        yield f"Wrong, so without a figure: {', '.join(wrong)}."


def _training(rows: list[Row]) -> Fragments:
    measured = [row for row in rows if "tokens_per_s" in row]
    if measured:
        speed: list[tuple[str, Callable[[Row], bool]]] = [("tokens per second", lambda row: True)]
        yield _chart(
            "training speed",
            charts.bars(measured, speed, lambda row: float(row["tokens_per_s"]), "tokens/s"),
        )
        weighed = [{**row, "step": None} for row in measured if row.get("peak_bytes")]
        if weighed:
            memory: list[tuple[str, Callable[[Row], bool]]] = [("peak memory", lambda row: True)]
            yield _chart(
                "peak memory",
                charts.bars(weighed, memory, lambda row: float(row["peak_bytes"]) / 2**30, "GiB"),
            )
    yield from details(measured, [row for row in rows if row.get("error")])


def _generation(rows: list[Row]) -> Fragments:
    measured = [row for row in rows if "tokens_per_s" in row]
    if measured:
        columns: list[tuple[str, Callable[[Row], bool]]] = [
            (f"batch {batch}", lambda row, batch=batch: row["batch"] == batch)  # type: ignore[misc]  # bound
            for batch in sorted({row["batch"] for row in measured})
        ]
        drawn = charts.bars(
            measured, columns, lambda row: float(row["tokens_per_s"]), "tokens/s",
            limit=lambda row: float(row["limit_tokens_per_s"]),
        )  # fmt: skip
        yield _chart("decoding speed", drawn, _CAPTION)
    yield from details(measured, [row for row in rows if row.get("error")])


def _chart(alt: str, drawn: Any, caption: str = "") -> str:
    data = base64.b64encode(charts.svg(drawn)).decode("ascii")
    picture = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
    said = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{picture}{said}</figure>"


def _made(machines: list[Row]) -> Fragments:
    yield "<p>" + html.escape(spread_note()) + "</p><ul class=commands>"
    for machine in machines:
        for command in machine["commands"]:
            yield f"<li><code>{html.escape(command)}</code></li>"
    yield "</ul><details><summary>The machine</summary><pre>"
    yield html.escape(json.dumps(machines[0], indent=2)) + "</pre></details>"


def _summary(machines: list[Row], found: dict[str, list[Row]], table: list[Target]) -> Fragments:
    machine = machines[0]
    yield f"# gptopt bench: {device_name(machine)}\n"
    if machine["gpu"] is None:
        yield f"> {MACHINERY}\n"
    yield f"{machines[-1]['date']}, commit {machine['machine']['commit']}. Made by:\n"
    for one in machines:
        yield from (f"    {command}" for command in one["commands"])
    yield ""
    yield "| target | wanted | reached | limit |\n|---|---|---|---|"
    for line in table:
        yield f"| {line.what} | {line.target} | {line.reached} | {line.limit} |"
    main = [r for r in found["kernels"] if "cold" in r and r["contender"] != BOUND]
    if main:
        yield "\n| operator | case | phase | contender | median ms | of the limit | right |"
        yield "|---|---|---|---|---|---|---|"
        for row in main:
            right = {True: "yes", False: "NO", None: "not checked"}[row["correct"]]
            share = f"{100 * row['share_of_limit']:.0f} %" if row["correct"] else "-"
            yield (
                f"| {row['operator']} | {row['case']} | {row['phase']} | {row['contender']} |"
                f" {row['cold']['median_ms']:.4g} | {share} | {right} |"
            )
    for name, unit in (("training", "tokens/s"), ("generate", "tokens/s")):
        rows = [row for row in found[name] if "tokens_per_s" in row]
        if rows:
            yield f"\n| {name} | batch | {unit} | right |\n|---|---|---|---|"
            for row in rows:
                batch = row.get("batch", row["case"].rpartition(" ")[2])
                said = f"{row['tokens_per_s']:,.0f} | yes" if row["correct"] else "- | NO"
                yield f"| {row['contender']} | {batch} | {said} |"
    yield ""


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
