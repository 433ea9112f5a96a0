"""What a run logged, as a picture: its loss while it trains, and `gptopt plot` for any runs."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptopt.config import PlotOptions
from gptopt.errors import UserError
from gptopt.log import say
from gptopt.training.metrics import METRICS, Line, read_metrics

logger = logging.getLogger(__name__)

_FORMATS = ("png", "svg", "pdf")
# key of metrics.jsonl -> what stands at the axis, and what its numbers are divided by
_PANELS = {
    "loss": ("loss (nats per token)", 1),
    "lr": ("learning rate", 1),
    "grad_norm": ("gradient norm", 1),
    "tokens_per_second": ("tokens/s", 1),
    "memory_bytes": ("memory (GiB)", 2**30),
}
_AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}


def draw_loss(metrics: Path, picture: Path, title: str) -> bool:
    """Draw training and validation loss, and the learning rate below them, into a PNG.

    Returns:
        Whether there was something to draw and matplotlib to draw it with.
    """
    lines = read_metrics(metrics)
    if not lines:
        return False
    try:
        _draw_runs({"": lines}, picture, title=title, panels=("loss", "lr"), axis="step")
    except ImportError:
        logger.warning("%s: not drawn, matplotlib is missing; pip install matplotlib", picture)
        return False
    return True


def plot(options: PlotOptions) -> dict[str, Any]:
    """Draw loss, learning rate, gradient norm, throughput and memory of runs into one picture.

    Returns:
        picture (its path), and runs: of each name, steps, loss and best_val_loss (null where none
        was logged).

    Raises:
        UserError: a folder that is no run or has logged nothing, two runs of one name, or a
            picture that cannot be written.
    """
    picture = Path(options.out)
    if picture.suffix.lower().removeprefix(".") not in _FORMATS:
        raise UserError(
            f"--out {picture}: found {picture.suffix or 'no ending'}, expected "
            f"{', '.join('.' + name for name in _FORMATS)}"
        )
    if not picture.parent.is_dir():
        raise UserError(f"--out {picture}: there is no folder {picture.parent}; make it first")
    runs = _read_runs([Path(run) for run in options.runs])
    logged = [key for key in _PANELS if any(key in line for run in runs.values() for line in run)]
    try:
        _draw_runs(runs, picture, title="", panels=logged, axis=options.x)
    except OSError as error:
        raise UserError(f"--out {picture}: cannot be written ({error.strerror})") from None
    result = {
        "picture": str(picture),
        "runs": [
            {
                "name": name,
                "steps": lines[-1]["step"],
                "loss": _last(lines, "loss"),
                "best_val_loss": min(
                    (line["val_loss"] for line in lines if line.get("val_loss") is not None),
                    default=None,
                ),
            }
            for name, lines in runs.items()
        ],
    }
    if not options.json_output:
        say(str(picture))
    return result


def _read_runs(folders: Sequence[Path]) -> dict[str, list[Line]]:
    runs: dict[str, list[Line]] = {}
    for folder in folders:
        if not (folder / METRICS).is_file():
            raise UserError(f"{folder}: has no {METRICS}; give the folder that gptopt train wrote")
        lines = read_metrics(folder / METRICS)
        if not lines:
            raise UserError(f"{folder / METRICS}: has logged nothing yet; try again later")
        # The last part of the path where that tells them apart, else the whole.
        alike = [other for other in folders if other.name == folder.name]
        name = folder.name if len(alike) == 1 and folder.name else str(folder)
        if name in runs:
            raise UserError(f"{folder}: given twice; name each run once")
        runs[name] = lines
    return runs


def _last(lines: list[Line], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def _draw_runs(
    runs: dict[str, list[Line]], picture: Path, *, title: str, panels: Sequence[str], axis: str
) -> None:
    """One panel below the other, the loss's the tallest; a run keeps its colour in all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [4 if key == "loss" else 1 for key in panels]
    figure = Figure(figsize=(8, 1 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
    for key, (axes,) in zip(panels, grid, strict=True):
        label, unit = _PANELS[key]
        for at, (name, lines) in enumerate(runs.items()):
            of, colour = (f"{name} " if name else ""), f"C{at}"
            _draw(axes, lines, axis, key, unit, label=f"{of}training", color=colour, linewidth=1)
            if key == "loss":
                other = "tab:orange" if len(runs) == 1 else colour
                _draw(
                    axes, lines, axis, "val_loss", unit, label=f"{of}validation", color=other,
                    marker="o", markersize=3, linewidth=1, linestyle="--",
                )  # fmt: skip
        axes.set_ylabel(label if key == "loss" else label.replace(" (", "\n("))
        axes.grid(alpha=0.3)
    for key, (axes,) in zip(panels, grid, strict=True):
        if key == "loss":
            axes.legend()
    grid[0][0].set_title(title)
    grid[-1][0].set_xlabel(_AXES[axis])
    figure.align_ylabels()
    staged = picture.with_name(f".tmp-{picture.name}")
    try:
        figure.savefig(staged, format=picture.suffix.lower().removeprefix("."), dpi=120)
        staged.replace(picture)
    finally:
        staged.unlink(missing_ok=True)


def _draw(axes: Any, lines: list[Line], axis: str, key: str, unit: float, **style: Any) -> None:
    points = [(line[axis], line[key] / unit) for line in lines if line.get(key) is not None
              and line.get(axis) is not None]  # fmt: skip
    if points:
        places, values = zip(*points, strict=True)
        axes.plot(places, values, **style)
