"""`gptopt run --tune`: which threads decode fastest on this machine, measured once and kept.

The number of threads is found first, with threads that spin during a run; then how they wait. One
choice stands for the machine and the provider, whatever the model: run it on a machine that does
nothing else, with a model of the size that will run there.
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptopt.runtime import settings
from gptopt.runtime.cache import Cache
from gptopt.runtime.settings import Settings
from gptopt.runtime.variants import AUTO

logger = logging.getLogger(__name__)

Opener = Callable[[Settings], Cache]

_PROMPT = 16
_WARM_UP, _STEPS = 4, 48
_SECONDS = 0.5  # per candidate, after which no step is begun
_CLEARLY = 1.03  # a faster choice must be so much faster than one that leaves more to others


@dataclass(frozen=True)
class Tuning:
    """What was found: the choice, tokens per second of every candidate, whether it was kept."""

    settings: Settings
    rates: list[dict[str, Any]]
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self.settings), "rates": self.rates, "kept": self.kept}


def tune(folder: Path | str, *, precision: str = AUTO, provider: str = "cpu") -> Tuning:
    """Measure with an exported folder, and keep the choice in the user's cache directory.

    Raises:
        UserError, CheckFailed: as EdgeModel.
    """
    from gptopt.runtime.edge import EdgeModel
    from gptopt.runtime.folder import verify_folder

    verify_folder(Path(folder), precision)

    def opened(candidate: Settings) -> Cache:
        return EdgeModel(
            folder, precision=precision, provider=provider, threads=candidate.threads,
            spinning=candidate.spinning, verify=False,
        ).new_cache()  # fmt: skip

    found, rates = search(opened, settings.cpus())
    return Tuning(found, rates, settings.keep(provider.lower(), found, rates))


def search(
    opened: Opener, cpus: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[Settings, list[dict[str, Any]]]:
    """The best settings for so many processors, and what every candidate reached.

    Args:
        opened: an empty cache of one row of a session with some settings.
        cpus: logical processors that may be used.
        clock: seconds.
    """
    rates: list[dict[str, Any]] = []

    def best(candidates: list[Settings]) -> Settings:
        winner, top = candidates[0], 0.0
        for candidate in candidates:
            rate = _rate(opened, candidate, clock)
            rates.append({**asdict(candidate), "tokens_per_second": round(rate, 2)})
            logger.info(
                "%d threads, spinning %s: %.1f tokens/s",
                candidate.threads, candidate.spinning, rate,
            )  # fmt: skip
            if rate > top * _CLEARLY:
                winner, top = candidate, rate
        return winner

    winner = best([Settings(n, "run" if n > 1 else "off") for n in thread_counts(cpus)])
    if winner.threads == 1:  # nobody waits
        return winner, rates
    return best([Settings(winner.threads, spinning) for spinning in settings.SPINNING]), rates


def thread_counts(cpus: int) -> list[int]:
    """1, 2, 4 ... and the number itself and its half, for one thread of each core."""
    powers = [2**n for n in range(cpus.bit_length()) if 2**n <= cpus]
    return sorted({*powers, max(1, cpus // 2), cpus})


def _rate(opened: Opener, candidate: Settings, clock: Callable[[], float]) -> float:
    """Tokens per second of one row, from the median step."""
    cache = opened(candidate)
    cache.read([list(range(min(_PROMPT, cache.capacity // 2)))])
    steps = min(_WARM_UP + _STEPS, cache.capacity - cache.columns)
    live = np.ones(1, dtype=np.bool_)
    taken: list[float] = []
    began = clock()
    for step in range(steps):
        before = clock()
        cache.step(np.array([step % 7]), live)
        taken.append(clock() - before)
        if clock() - began > _SECONDS and step >= _WARM_UP:
            break
    return 1 / max(statistics.median(taken[_WARM_UP:] or taken), 1e-9)
