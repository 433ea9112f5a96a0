"""How long a call takes: contenders in balanced turns, cold and warm cache, medians and quartiles.

On a GPU the device is held back until all of a call's kernels are queued, then the time between two
events is read: what the device needs, without the gaps in which it would wait for Python. What a
lone eager call costs, those gaps included, is measured as `wall_ms`.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 60
_WALL_CALLS, _WALL_MS = 15, 1000.0
_HOLD_MS = 25.0  # the longest that the device is held back
_CPU_FLUSH_BYTES = 16 << 20
_GPU_FLUSH_BYTES = 256 << 20


class TimeBudget:
    """The time of --minutes, from now on; None never ends."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def is_spent(self) -> bool:
        """Whether nothing new should be started."""
        return self._end is not None and time.monotonic() >= self._end


@dataclass
class Subject:
    """Something to time: `prepare` is not timed, `run` is, with what prepare returned."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    host_ms: float = 0.0  # until a call returns; found by `wall`


@dataclass(frozen=True)
class Spread:
    """Median and quartiles in milliseconds, and of how many samples."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """The spread of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))


@dataclass
class Timing:
    """What was found about one subject; `error` says why it ended early, if it did."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None


class Clock(Protocol):
    """A device's way of timing."""

    def time(self, subject: Subject, *, cold: bool) -> float:
        """Milliseconds of one call, with the caches flushed before or filled by another call."""

    def wall(self, subject: Subject) -> tuple[float, float]:
        """Milliseconds of one lone call until its result is there, and until it returned."""

    def peak_bytes(self, subject: Subject) -> int | None:
        """Device memory that a call needs on top of what was there; None where nobody counts."""


def clock_of(device: torch.device) -> Clock:
    """The clock of a device, cpu or cuda."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class CpuClock:
    """Wall time; "cold" walks over a buffer larger than most last-level caches."""

    def __init__(self) -> None:
        self._flush = torch.zeros(_CPU_FLUSH_BYTES // 4)

    def time(self, subject: Subject, *, cold: bool) -> float:
        """See Clock."""
        if not cold:
            subject.run(subject.prepare())
        state = subject.prepare()
        if cold:
            self._flush.add_(1.0)
        started = time.perf_counter()
        subject.run(state)
        return (time.perf_counter() - started) * 1e3

    def wall(self, subject: Subject) -> tuple[float, float]:
        """See Clock."""
        state = subject.prepare()
        started = time.perf_counter()
        subject.run(state)
        subject.host_ms = (time.perf_counter() - started) * 1e3
        return subject.host_ms, subject.host_ms

    def peak_bytes(self, subject: Subject) -> int | None:
        """See Clock."""
        return None


class CudaClock:
    """CUDA events around a call whose kernels are all queued before the first one starts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        flush_bytes = max(4 * int(cache), _GPU_FLUSH_BYTES)
        self._flush = torch.zeros(flush_bytes // 4, dtype=torch.int32, device=device)
        self._sleep: Callable[[int], None] | None = getattr(torch.cuda, "_sleep", None)
        self._cycles_per_ms = self._calibrate()

    def time(self, subject: Subject, *, cold: bool) -> float:
        """See Clock."""
        if not cold:
            subject.run(subject.prepare())
        state = subject.prepare()
        before, after = _event(), _event()
        self._hold(subject.host_ms)
        if cold:
            self._flush.zero_()
        before.record()
        result = subject.run(state)
        after.record()
        after.synchronize()
        del result
        return float(before.elapsed_time(after))

    def wall(self, subject: Subject) -> tuple[float, float]:
        """See Clock."""
        state = subject.prepare()
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        result = subject.run(state)
        returned = time.perf_counter()
        torch.cuda.synchronize(self._device)
        wall_ms = (time.perf_counter() - started) * 1e3
        subject.host_ms = (returned - started) * 1e3
        del result
        return wall_ms, subject.host_ms

    def peak_bytes(self, subject: Subject) -> int | None:
        """See Clock."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        result = subject.run(subject.prepare())
        torch.cuda.synchronize(self._device)
        del result
        return torch.cuda.max_memory_allocated(self._device) - before

    def _calibrate(self) -> float:
        if self._sleep is None:
            return 0.0
        cycles = 2_000_000
        self._sleep(cycles)
        before, after = _event(), _event()
        before.record()
        self._sleep(cycles)
        after.record()
        after.synchronize()
        return float(cycles / max(before.elapsed_time(after), 1e-3))

    def _hold(self, host_ms: float) -> None:
        """Keep the device busy for as long as the host needs to queue a call."""
        if self._sleep is not None:
            self._sleep(int(self._cycles_per_ms * min(1.5 * host_ms + 0.05, _HOLD_MS)))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of `count` contenders in which nobody profits from a place or a predecessor.

    Over all of them each stands equally often in each place, and each ordered pair of neighbours
    comes equally often. Source: Williams 1949, Aust. J. Sci. Res. A 2, 149-168.
    """
    zigzag = [(k + 1) // 2 if k % 2 else (count - k // 2) % count for k in range(count)]
    orders = [[(place + turn) % count for place in zigzag] for turn in range(count)]
    if count % 2 and count > 1:
        orders += [order[::-1] for order in orders]
    return orders


def measure(
    clock: Clock, subjects: Sequence[Subject], *, seconds: float, rounds: int = 0
) -> dict[str, Timing]:
    """Time all subjects in balanced turns.

    A subject that fails is left out from then on, and its Timing says why.

    Args:
        clock: of the device.
        subjects: warmed up already, or at least able to run.
        seconds: how long all of this should take, about.
        rounds: 0 finds as many as fit, between 5 and 60, in whole cycles of the orders if it can.
    """
    timings = {subject.name: Timing() for subject in subjects}
    for subject in subjects:
        timing = timings[subject.name]
        _attempt(timing, partial(_first_calls, clock, subject, timing))
    alive = [subject for subject in subjects if timings[subject.name].error is None]
    orders = balanced_orders(len(alive))
    # A visit runs a call three times: cold, and twice for warm.
    cycle_ms = sum(4 * statistics.median(timings[subject.name].wall) for subject in alive) or 1.0
    wanted = rounds or _fitting(seconds * 1e3 / cycle_ms, len(orders))
    for turn in range(wanted if alive else 0):
        for place in orders[turn % len(orders)]:
            subject = alive[place]
            timing = timings[subject.name]
            if timing.error is None:
                _attempt(timing, partial(_visit, clock, subject, timing))
    return timings


def _fitting(rounds: float, cycle: int) -> int:
    inside = int(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))
    return max(1, inside // cycle) * cycle if inside >= cycle else inside


def _first_calls(clock: Clock, subject: Subject, timing: Timing) -> None:
    clock.wall(subject)
    for _ in range(_WALL_CALLS):
        wall_ms, host_ms = clock.wall(subject)
        timing.wall.append(wall_ms)
        timing.host.append(host_ms)
        if sum(timing.wall) > _WALL_MS and len(timing.wall) >= MIN_ROUNDS:
            break
    subject.host_ms = statistics.median(timing.host)
    timing.peak_bytes = clock.peak_bytes(subject)


def _visit(clock: Clock, subject: Subject, timing: Timing) -> None:
    timing.cold.append(clock.time(subject, cold=True))
    timing.warm.append(clock.time(subject, cold=False))


def _attempt(timing: Timing, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:
        timing.error = reason(error)
        del error
        free_memory()


def reason(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}".rstrip(": ")


def free_memory() -> None:
    """Give back what failed or finished contenders held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_is_lost(device: torch.device) -> bool:
    """Whether an earlier error left the device unusable for this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False
