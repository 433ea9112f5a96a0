"""Reading ahead changes nothing but the waiting."""

import threading
import time

import pytest

from gptopt.training.objective import Batch
from gptopt.training.prefetch import Prefetched


class Counting:
    """Batch n is [n]; number `broken` cannot be read."""

    def __init__(self, broken=-1, slow=0.0):
        self.at, self.broken, self.slow = 0, broken, slow
        self.threads = set()

    def next(self):
        self.threads.add(threading.current_thread())
        time.sleep(self.slow)
        if self.at == self.broken:
            raise OSError("the disk is gone")
        self.at += 1
        return Batch({}, 1, 1, 1, [self.at - 1])

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def wheres(batches, count):
    return [batches.next().where[0] for _ in range(count)]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_batches_come_in_order_and_the_position_is_of_those_handed_out(ahead):
    batches = Prefetched(Counting(), ahead)
    assert batches.state_dict() == {"at": 0}
    for expected in range(10):
        assert batches.next().where == [expected]
        assert batches.state_dict() == {"at": expected + 1}


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_position_is_gone_back_to_whatever_was_read_ahead(ahead):
    batches = Prefetched(Counting(slow=0.002), ahead)
    wheres(batches, 4)
    kept = batches.state_dict()
    assert wheres(batches, 3) == [4, 5, 6]
    batches.load_state_dict(kept)
    assert batches.state_dict() == kept
    assert wheres(batches, 3) == [4, 5, 6]


def test_what_cannot_be_read_is_raised_where_it_is_wanted_and_not_before():
    batches = Prefetched(Counting(broken=3), ahead=2)
    assert wheres(batches, 3) == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        batches.next()
    assert batches.state_dict() == {"at": 3}


def test_while_the_caller_works_the_next_batch_is_read():
    source = Counting(slow=0.05)
    batches = Prefetched(source, ahead=1)
    batches.next()
    first, batches.waited = batches.waited, 0.0
    for _ in range(3):
        time.sleep(0.1)
        batches.next()
    assert first >= 0.05
    assert batches.waited < first
    assert threading.current_thread() not in source.threads


def test_the_wait_is_a_logged_figure(options):
    import json
    from pathlib import Path

    from gptopt.training import train

    result = train(options("run", accumulate=2))
    lines = (Path(result["out"]) / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["data_wait_ms"] >= 0 for line in lines)
