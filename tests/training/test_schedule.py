"""The learning rate, by steps and by time."""

import math
from itertools import pairwise

import pytest

from gptopt.training.schedule import WARMUP_SHARE, Schedule


@pytest.fixture
def rates(options):
    def make(seconds_per_step=0.0, **changes):
        values = {"steps": 21, "warmup_steps": 4, "lr": 1e-2, "min_lr": 1e-3} | changes
        chosen = options(**values)
        schedule = Schedule(chosen)
        return [schedule.lr(step, step * seconds_per_step) for step in range(chosen.steps)]

    return make


def test_warm_up_is_linear_and_ends_at_the_peak(rates):
    found = rates()
    assert found[:4] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3])
    assert found[4] == pytest.approx(1e-2)


def test_cosine_falls_to_min_lr_on_the_last_step(rates):
    found = rates()
    middle = 4 + (20 - 4) // 2
    assert found[middle] == pytest.approx((1e-2 + 1e-3) / 2)
    quarter = 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi / 4))
    assert found[8] == pytest.approx(quarter)
    assert found[-1] == pytest.approx(1e-3)


def test_linear_falls_evenly_to_min_lr(rates):
    found = rates(schedule="linear")
    falls = [a - b for a, b in pairwise(found[4:])]
    assert falls == pytest.approx([9e-3 / 16] * 16)
    assert found[-1] == pytest.approx(1e-3)


def test_constant_stays_at_the_peak(rates):
    assert rates(schedule="constant")[4:] == pytest.approx([1e-2] * 17)


def test_no_warm_up_starts_at_the_peak(rates):
    assert rates(warmup_steps=0)[0] == pytest.approx(1e-2)


def test_one_step_alone_is_taken_at_the_peak(rates):
    assert rates(steps=1, warmup_steps=0) == pytest.approx([1e-2])


def test_time_drives_the_schedule_when_it_runs_out_first(rates):
    # 100,000 steps would never be reached: 200 steps of 0.05 s fill the budget of 10 s.
    found = rates(0.05, steps=100_000, max_seconds=10)[:201]
    assert max(found) == pytest.approx(1e-2)
    assert found[200] == pytest.approx(1e-3)
    falling = found[4:]
    assert falling == sorted(falling, reverse=True)


def test_steps_drive_the_schedule_when_they_run_out_first(rates):
    assert rates(0.001, max_seconds=1000) == pytest.approx(rates(), rel=1e-3)


def test_warm_up_takes_at_most_a_share_of_a_time_budget(rates):
    # Ten slow steps in the budget: a warm-up of 1000 steps would never end.
    found = rates(1.0, steps=100_000, warmup_steps=1000, max_seconds=10)[:11]
    assert found[int(10 * WARMUP_SHARE)] == pytest.approx(1e-2)
    assert found[10] == pytest.approx(1e-3)


def test_the_end_of_the_warm_up_survives_a_resume(options):
    chosen = options(steps=1000, warmup_steps=4, max_seconds=100)
    straight = Schedule(chosen)
    expected = [straight.lr(step, step * 2.0) for step in range(20)]
    resumed = Schedule(chosen, None)
    for step in range(10):
        resumed.lr(step, step * 2.0)
    resumed = Schedule(chosen, resumed.warm_end)
    assert [resumed.lr(step, step * 2.0) for step in range(10, 20)] == expected[10:]
