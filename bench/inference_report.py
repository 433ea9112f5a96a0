"""Rows of `gptopt bench inference` as medians, ratios and shares of the floor: a table, a chart."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptopt.bench.inference_goals import reached, table

Row = dict[str, Any]

PROBE = "memory read"
_WIDEST = 4.0  # ratio at which a bar is cut


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One line for each contender and workload.

    value: median of tokens per second, or of milliseconds to the first token where one token was
    made; low, high: its range; ratio: of the anchor's median (above 1 is faster); floor_share: of
    the tokens per second at which weights and cache could be read once per token, at the bandwidth
    that the probe found in the same turns; disturbed: samples during which other processes took
    more than a tenth of a CPU.
    """
    head = rows[0]
    loads = {row["contender"]: row for row in rows if row.get("kind") == "load"}
    samples: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("kind") == "sample" and "error" not in row:
            samples.setdefault((row["workload"], row["contender"]), []).append(row)
    medians = {key: statistics.median(_values(found)) for key, found in samples.items()}
    lines = []
    for (workload, contender), found in samples.items():
        values = _values(found)
        rate = _is_rate(found)
        line = {
            "workload": workload, "contender": contender, "unit": "tokens/s" if rate else "ms",
            "value": medians[workload, contender], "low": min(values), "high": max(values),
            "samples": len(values), "disturbed": sum(row["other_cpu"] > 0.1 for row in found),
        }  # fmt: skip
        anchor = medians.get((workload, head["anchor"]))
        if anchor and contender != PROBE:
            mine = line["value"]
            line["ratio"] = mine / anchor if rate else anchor / mine
        bandwidth = medians.get((workload, PROBE))
        if rate and bandwidth and contender != PROBE and workload.startswith("decode"):
            bytes_read = _bytes_per_token(head, loads[contender], workload)
            line["floor_share"] = line["value"] / (bandwidth * 1e9 / bytes_read)
        lines.append(line)
    return lines


def _is_rate(found: Sequence[Row]) -> bool:
    return "tokens_per_s" in found[0]


def _values(found: Sequence[Row]) -> list[float]:
    key = "tokens_per_s" if _is_rate(found) else "first_ms"
    return [float(row[key]) for row in found]


def _bytes_per_token(head: Row, load: Row, workload: str) -> float:
    """Weights (all that lies on disk) and the cache in the middle of the generation."""
    prompt, new = (int(part) for part in workload.split()[-1].split("+"))
    shape = head["shape"]
    cache = 2 * shape["n_layer"] * shape["n_embd"] * (prompt + new / 2) * load["cache_bytes"]
    return float(load["disk_bytes"] + cache)


def write_table(out: Path, rows: Sequence[Row], summary: Sequence[Row]) -> Path:
    """inference.md: a row for each contender, a column for each workload; then the goals."""
    workloads = list(dict.fromkeys(line["workload"] for line in summary))
    contenders = list(dict.fromkeys(line["contender"] for line in summary))
    found = {(line["workload"], line["contender"]): line for line in summary}
    loads = {row["contender"]: row for row in rows if row.get("kind") == "load"}
    peaks = {row["contender"]: row["peak_mib"] for row in rows if row.get("kind") == "memory"}
    agreement = {row["contender"]: row for row in rows if row.get("kind") == "agreement"}
    head = rows[0]
    machine = head["machine"]
    text = [
        f"{_processor(machine)}, {head['threads']} threads, commit {machine['commit']}. Medians "
        f"(lowest-highest), ratio to {head['anchor']}: above 1 is faster. {PROBE}: GB/s.",
        "",
    ]
    columns = ["contender", *workloads, "of the floor", "peak MiB", "disk MB", "tokens as PyTorch"]
    text.append("| " + " | ".join(columns) + " |")
    text.append("|---" * len(columns) + "|")
    for contender in contenders:
        cells = [contender]
        cells += [_cell(found.get((workload, contender))) for workload in workloads]
        shares = [found.get((w, contender), {}).get("floor_share") for w in workloads]
        cells.append(" / ".join(f"{100 * share:.0f}%" for share in shares if share is not None))
        cells.append(_number(peaks.get(contender), ".0f"))
        cells.append(_number(loads.get(contender, {}).get("disk_bytes", 0) / 1e6 or None, ".1f"))
        same = agreement.get(contender, {})
        told = same.get("same")
        cells.append("" if told is None else f"{told}/{same['tokens']}")
        text.append("| " + " | ".join(cells) + " |")
    if goals := reached(rows, summary):
        text += ["", *table(goals)]
    if profiles := [row for row in rows if row.get("kind") == "profile"]:
        text += ["", *limits(profiles)]
    path = out / "inference.md"
    path.write_text("\n".join([*text, ""]), encoding="utf-8")
    return path


def _processor(machine: Row) -> str:
    """Its name, and the instruction sets that decide how it multiplies."""
    sets = machine.get("instructions")
    return f"{machine['processor']} ({', '.join(sets)})" if sets else str(machine["processor"])


def limits(profiles: Sequence[Row]) -> list[str]:
    """What a token's or a prompt's time, or memory, goes to, as Markdown: a line for each profile.

    What is furthest above the time that its bytes take at the bandwidth of the same minute, or its
    operations at the rate of the best product, is what limits. The profiler makes each node some
    microseconds longer, so the parts may add up to more than the whole, which was timed without.
    """
    text = [
        "Where a goal is missed, onnxruntime's profile of our nearest contender:",
        "",
        "| profiled | takes | this machine | products | attention | other operators "
        "| furthest above the floor |",
        "|---" * 7 + "|",
    ]
    text += [_limit(row) for row in profiles if "operators" in row]
    if memory := [row for row in profiles if "stages" in row]:
        text += ["", "| memory of | MiB after each stage (of it private); peak | weights | cache |"]
        text += ["|---" * 4 + "|", *map(_memory, memory)]
    return text


def _limit(row: Row) -> str:
    unit = "bytes" if "token_ms" in row else "ops"
    rate = row["memory_gb_per_s"] * 1e9 if unit == "bytes" else row["ops_per_s"]
    parts: dict[str, list[Row]] = {"products": [], "attention": [], "other operators": []}
    for operator in row["operators"]:
        op = operator["op"]
        kind = "products" if "MatMul" in op else "attention" if "Attention" in op else ""
        parts[kind or "other operators"].append(operator)
    total = sum(operator["us"] for operator in row["operators"])
    cells, above = [], {}
    for name, operators in parts.items():
        time_us = sum(operator["us"] for operator in operators)
        need = sum(operator[unit] for operator in operators)
        above[name] = time_us - need / rate * 1e6
        cell = f"{time_us / 1e3:.2f} ms ({100 * time_us / total:.0f}%), "
        cell += f"{sum(operator['nodes'] for operator in operators)} nodes"
        if need and time_us:
            speed = need / time_us * 1e6
            what = f"{need / 1e6:.1f} MB at {speed / 1e9:.1f} GB/s"
            if unit == "ops":
                what = f"{need / 1e9:.1f} G at {speed / 1e9:.0f} G/s"
            cell += f", {what} ({speed / rate:.2f})"
        cells.append(cell)
    most = max(above, key=lambda name: above[name])
    taken = row["token_ms"] if unit == "bytes" else row["first_ms"]
    can = f"reads {rate / 1e9:.1f} GB/s" if unit == "bytes" else f"multiplies {rate / 1e9:.0f} G/s"
    return (
        f"| {row['contender'].removeprefix('gptopt ')}, {row['workload']} "
        f"| {taken:.2f} ms | {can} | {' | '.join(cells)} "
        f"| {most}, by {above[most] / 1e3:.2f} ms |"
    )


def _memory(row: Row) -> str:
    stages = [
        f"{stage['stage']}: {stage['private_mib'] + stage['files_mib']:.0f} "
        f"({stage['private_mib']:.0f}); {stage['peak_mib']:.0f}"
        for stage in row["stages"]
    ]
    name = row["contender"].removeprefix("gptopt ")
    return f"| {name} | {', '.join(stages)} | {row['weights_mib']:.0f} | {row['cache_mib']:.0f} |"


def _cell(line: Row | None) -> str:
    if line is None:
        return "-"
    digits = ".0f" if line["value"] >= 100 else ".1f"
    shown = f"{line['value']:{digits}} ({line['low']:{digits}}-{line['high']:{digits}})"
    return shown + (f" {line['ratio']:.2f}x" if "ratio" in line else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write_chart(out: Path, rows: Sequence[Row], summary: Sequence[Row]) -> Path:
    """inference.svg: of each workload, the ratios to the anchor as bars."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    raced = [line for line in summary if "ratio" in line]
    workloads = list(dict.fromkeys(line["workload"] for line in raced))
    contenders = list(dict.fromkeys(line["contender"] for line in raced))
    height = 1.2 + 0.24 * len(contenders)
    figure = Figure(
        figsize=(3.2 * len(workloads) + 2, height), layout="constrained", facecolor="white"
    )
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, max(len(workloads), 1), sharey=True, squeeze=False)[0]
    for axis, workload in zip(axes, workloads, strict=False):
        found = {line["contender"]: line for line in raced if line["workload"] == workload}
        for place, contender in enumerate(contenders):
            line = found.get(contender)
            if line is None:
                continue
            own = contender.startswith("gptopt")
            axis.barh(place, min(line["ratio"], _WIDEST), color="#0b7a75" if own else "#9fb0b9")
            digits = ".0f" if line["value"] >= 100 else ".1f"
            axis.text(0.03, place, f"{line['value']:{digits}} {line['unit']}", va="center",
                      fontsize=7, color="white" if own else "#1c2b33")  # fmt: skip
        axis.axvline(1.0, color="#1c2b33", linewidth=0.8)
        axis.set_title(workload, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(contenders)), contenders)
    axes[0].invert_yaxis()
    figure.suptitle(f"Speed over {rows[0]['anchor']}; longer is faster", fontsize=10)
    path = out / "inference.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
