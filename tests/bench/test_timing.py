"""Turns are balanced, a failing contender ends alone, and spreads are those of the samples."""

from collections import Counter
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")  # before what imports it: hence E402 below

from gptopt.bench import timing  # noqa: E402
from gptopt.bench.timing import (  # noqa: E402
    MIN_ROUNDS,
    CpuClock,
    CudaClock,
    Spread,
    Subject,
    TimeBudget,
    balanced_orders,
    measure,
)


@pytest.mark.parametrize("count", range(1, 9))
def test_nobody_profits_from_a_place_or_a_predecessor(count):
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = Counter(pair for order in orders for pair in enumerate(order))
    assert len(places) == count * count
    assert len(set(places.values())) == 1
    neighbours = Counter(pair for order in orders for pair in pairwise(order))
    assert len(neighbours) == count * (count - 1)
    assert len(set(neighbours.values())) <= 1


def test_contenders_are_called_in_those_orders():
    called = []
    subjects = [Subject(name, lambda _, name=name: called.append(name)) for name in "abcd"]
    measure(CpuClock(), subjects, seconds=0.0, rounds=4)
    visits = called[-4 * 4 * 3 :: 3]  # a visit calls three times: cold, and twice for warm
    expected = ["abcd"[place] for order in balanced_orders(4) for place in order]
    assert visits == expected


def test_a_failing_contender_is_left_out_and_says_why():
    calls = Counter()

    def fails_late(_):
        calls["late"] += 1
        if calls["late"] > 12:
            raise RuntimeError("out of\n  luck")

    def fails(_):
        raise ValueError("never")

    found = measure(
        CpuClock(),
        [Subject("late", fails_late), Subject("never", fails), Subject("fine", lambda _: None)],
        seconds=0.0,
        rounds=6,
    )
    assert found["late"].error == "RuntimeError: out of luck"
    assert found["never"].error == "ValueError: never"
    assert found["fine"].error is None
    assert len(found["fine"].cold) == len(found["fine"].warm) == 6
    assert calls["late"] == 13


def test_no_time_still_gives_a_few_rounds():
    found = measure(CpuClock(), [Subject("a", lambda _: None)], seconds=0.0)
    assert len(found["a"].cold) >= MIN_ROUNDS


def test_preparing_is_not_timed():
    def slow():
        torch.randn(400, 400) @ torch.randn(400, 400)

    clock = CpuClock()
    prepared = Subject("prepared", lambda _: None, slow)
    timed = Subject("timed", lambda _: slow())
    least = {s.name: min(clock.time(s, cold=False) for _ in range(5)) for s in (prepared, timed)}
    assert least["prepared"] < least["timed"] / 2


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_a_budget_ends():
    assert not TimeBudget(None).is_spent()
    assert not TimeBudget(5).is_spent()
    assert TimeBudget(1e-9).is_spent()


class _Device:
    """A GPU that needs no GPU: its clock moves by what is put on it."""

    now, log = 0.0, []

    class Event:
        """A moment."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = _Device.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    def sleep(cycles):
        assert isinstance(cycles, int)
        _Device.now += cycles / 1e6
        _Device.log.append("hold")


def test_a_gpu_is_timed_by_events_around_the_call_alone(monkeypatch):
    _Device.now, _Device.log = 0.0, []
    cuda = torch.cuda
    for name, value in {
        "Event": _Device.Event,
        "_sleep": _Device.sleep,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: type("P", (), {"L2_cache_size": 2**20}),
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 175,
        "reset_peak_memory_stats": lambda device: None,
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(timing, "_GPU_FLUSH_BYTES", 1024)
    clock = CudaClock(torch.device("cpu"))
    _Device.log.clear()

    def run(state):
        assert state == "prepared"
        _Device.now += 5.0
        _Device.log.append("run")

    subject = Subject("a", run, lambda: _Device.log.append("prepare") or "prepared")
    assert clock.time(subject, cold=True) == pytest.approx(5.0)
    assert _Device.log == ["prepare", "hold", "run"]
    _Device.log.clear()
    assert clock.time(subject, cold=False) == pytest.approx(5.0)
    assert _Device.log == ["prepare", "run", "prepare", "hold", "run"]
    assert clock.peak_bytes(subject) == 75
    wall_ms, host_ms = clock.wall(subject)
    assert wall_ms >= host_ms == subject.host_ms > 0
