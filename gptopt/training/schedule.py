"""The learning rate of each step, driven by steps or by a budget of time."""

import math
from dataclasses import dataclass

from gptopt.config import LoopOptions

WARMUP_SHARE = 0.1  # of a time budget: a slow machine must not spend it all on warming up


@dataclass
class Schedule:
    """Linear warm-up, then cosine, linear or constant, ending at min_lr on the last step.

    With `max_seconds` the progress is whichever is further, the share of steps or the share of
    time, so that the rate comes down in time on any machine. Source of the cosine: Loshchilov and
    Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    """

    options: LoopOptions
    warm_end: tuple[int, float] | None = None  # (step, seconds) at which the warm-up ended

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run lies behind before `step` (counted from 0), 0..1."""
        by_steps = step / max(1, self.options.steps - 1)
        return min(1.0, max(by_steps, self._time_share(seconds)))

    def lr(self, step: int, seconds: float) -> float:
        """The rate of `step` (counted from 0), `seconds` after the start of the run."""
        options = self.options
        if self.warm_end is None:
            ramp = (step + 1) / (options.warmup_steps + 1)
            ramp = max(ramp, self._time_share(seconds) / WARMUP_SHARE)
            if ramp < 1:
                return options.lr * ramp
            self.warm_end = (step, seconds)
        start = self.progress(*self.warm_end)
        share = (self.progress(step, seconds) - start) / (1 - start) if start < 1 else 0.0
        return options.min_lr + (options.lr - options.min_lr) * self._height(share)

    def _time_share(self, seconds: float) -> float:
        return seconds / self.options.max_seconds if self.options.max_seconds else 0.0

    def _height(self, share: float) -> float:
        match self.options.schedule:
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * share))
            case "linear":
                return 1 - share
            case "constant":
                return 1.0
