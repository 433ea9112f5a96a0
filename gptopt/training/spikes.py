"""Steps whose loss stands far above those before: told with what they read, for somebody to look.

Nothing is changed by a spike; steps that are not finite are another matter (gptopt.training.step).
"""

import statistics

SPIKES = "spikes.jsonl"
_WINDOW = 64  # steps that a loss is compared with
_LEAST = 16  # of them before anything is called a spike
_DEVIATIONS = 8.0  # robust standard deviations above the median


def spiked(recent: list[float], loss: float) -> float | None:
    """The median of the recent losses if this one stands out; it becomes one of them.

    The spread is the median absolute deviation, which one spike does not widen. Of several spikes
    in a row the first one counts: the others stand on a new level.
    """
    median = None
    if len(recent) >= _LEAST:
        middle = statistics.median(recent)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in recent)
        if loss > middle + _DEVIATIONS * max(spread, 0.01 * abs(middle)) >= recent[-1]:
            median = middle
    recent.append(loss)
    del recent[:-_WINDOW]
    return median
