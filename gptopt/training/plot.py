"""The loss curve of a run as a picture."""

import logging
from pathlib import Path
from typing import Any

from gptopt.training.metrics import Line, read_metrics

logger = logging.getLogger(__name__)


def draw_loss(metrics: Path, picture: Path, title: str) -> bool:
    """Draw training and validation loss, and the learning rate below them, into a PNG.

    Returns:
        Whether there was something to draw and matplotlib to draw it with.
    """
    lines = read_metrics(metrics)
    if not lines:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s: not drawn, matplotlib is missing; pip install matplotlib", picture)
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    loss, rate = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    _draw(loss, lines, "loss", label="training", color="tab:blue", linewidth=1)
    _draw(loss, lines, "val_loss", label="validation", color="tab:orange", marker="o", markersize=3)
    loss.set(title=title, ylabel="loss (nats per token)")
    loss.grid(alpha=0.3)
    loss.legend()
    _draw(rate, lines, "lr", color="tab:gray", linewidth=1)
    rate.set(xlabel="step", ylabel="lr")
    rate.grid(alpha=0.3)
    staged = picture.with_name(f".tmp-{picture.name}")
    figure.savefig(staged, format="png", dpi=120)
    staged.replace(picture)
    return True


def _draw(axes: Any, lines: list[Line], key: str, **style: Any) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, **style)
