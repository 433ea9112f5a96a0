"""How well texts were labelled: accuracy, F1, what was taken for what; for every runtime."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
THRESHOLD = 0.5  # of several labels, those whose probability is above it are given


def probabilities(scores: Floats, *, multi_label: bool) -> npt.NDArray[np.float64]:
    """Scores (N, L) as probabilities: of one label among all, or of each label by itself."""
    wide = scores.astype(np.float64)
    if multi_label:
        return 1 / (1 + np.exp(-np.clip(wide, -700, 700)))
    wide = np.exp(wide - wide.max(axis=-1, keepdims=True))
    found: npt.NDArray[np.float64] = wide / wide.sum(axis=-1, keepdims=True)
    return found


def given(chances: npt.NDArray[np.float64], *, multi_label: bool) -> npt.NDArray[np.bool_]:
    """Which labels (N, L) texts are given."""
    if multi_label:
        return np.greater(chances, THRESHOLD)
    likeliest = chances.argmax(axis=-1)[:, None]
    found: npt.NDArray[np.bool_] = np.arange(chances.shape[1])[None] == likeliest
    return found


def score_labels(
    scores: Floats, targets: Floats, labels: list[str], *, multi_label: bool
) -> dict[str, Any]:
    """Figures of scores (N, L) against targets (N, L) of 1 and 0.

    Returns:
        val_loss (nats per text; of several labels, the mean over them), accuracy (share of texts
        all of whose labels are right), f1 (the mean over labels that occur or were given), labels
        (of each: precision, recall, f1, count) and confusion ([true][given] counts; None where a
        text may have several labels).
    """
    chances = probabilities(scores, multi_label=multi_label)
    said, true = given(chances, multi_label=multi_label), targets > 0.5
    hits = (said & true).sum(axis=0)
    rows = {
        name: _of_label(int(hit), int(count), int(times))
        for name, hit, count, times in zip(
            labels, hits, true.sum(axis=0), said.sum(axis=0), strict=True
        )
    }
    known = [row["f1"] for row in rows.values() if row["f1"] is not None]
    confusion = None
    if not multi_label:
        confusion = (true.astype(np.int64).T @ said.astype(np.int64)).tolist()
    return {
        "val_loss": _loss(chances, true, multi_label),
        "accuracy": float((said == true).all(axis=1).mean()),
        "f1": math.fsum(known) / len(known) if known else 0.0,
        "labels": rows,
        "confusion": confusion,
    }


def _of_label(hits: int, count: int, times: int) -> dict[str, Any]:
    """None where there was nothing to be right about."""
    return {
        "precision": hits / times if times else None,
        "recall": hits / count if count else None,
        "f1": 2 * hits / (count + times) if count + times else None,
        "count": count,
    }


def _loss(chances: npt.NDArray[np.float64], true: npt.NDArray[np.bool_], several: bool) -> float:
    tiny = np.finfo(np.float64).tiny
    right = np.where(true, chances, 1 - chances) if several else chances[true]
    return float(-np.log(np.maximum(right, tiny)).mean())


def table(scores: dict[str, Any]) -> Iterable[str]:
    """The figures of each label as lines of text."""
    width = max(len(name) for name in scores["labels"])
    yield f"{'':<{width}}  precision  recall     f1  texts"
    for name, row in scores["labels"].items():
        shown = (f"{row[key]:.3f}" if row[key] is not None else "-" for key in
                 ("precision", "recall", "f1"))  # fmt: skip
        yield f"{name:<{width}}  {'  '.join(f'{each:>7}' for each in shown)}  {row['count']:>5}"
