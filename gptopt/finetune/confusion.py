"""Which labels were taken for which, as a picture."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

_MOST_LABELS = 40  # more of them are not legible


def draw_confusion(
    counts: npt.NDArray[np.int64], labels: list[str], picture: Path, title: str
) -> bool:
    """Draw [true][given] counts into a PNG; shades are shares of a row.

    Returns:
        Whether there was matplotlib to draw with, and labels few enough to be read.
    """
    if len(labels) > _MOST_LABELS:
        logger.warning("%s: not drawn, %d labels are too many to read", picture, len(labels))
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s: not drawn, matplotlib is missing; pip install matplotlib", picture)
        return False
    size = 3 + 0.45 * len(labels)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    axes: Any = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=60, ha="right")
    axes.set_yticks(places, labels)
    axes.set(title=title, xlabel="given", ylabel="true")
    for true in places:
        for given in places:
            if counts[true, given]:
                shade = "white" if shares[true, given] > 0.6 else "black"
                axes.text(given, true, str(counts[true, given]), ha="center", va="center",
                          color=shade, fontsize=8)  # fmt: skip
    staged = picture.with_name(f".tmp-{picture.name}")
    figure.savefig(staged, format="png", dpi=120)
    staged.replace(picture)
    return True
