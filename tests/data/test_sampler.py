import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptopt.data import Sampler
from gptopt.data.sampler import shuffled
from gptopt.errors import UserError

repeatable = settings(derandomize=True, deadline=None, max_examples=150)


@st.composite
def sizes(draw):
    block = draw(st.integers(1, 20))
    return {
        "n_tokens": block + 1 + draw(st.integers(0, 200)),
        "block_size": block,
        "batch_size": draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


def offsets(sampler, batches):
    return np.concatenate([sampler.next() for _ in range(batches)])


def one_epoch(size):
    """The offsets of the first epoch, in their order."""
    sampler = Sampler(**{**size, "batch_size": 1})
    taken = []
    while True:
        (offset,) = sampler.next()
        if sampler.epoch:
            return taken
        taken.append(int(offset))


@repeatable
@given(size=sizes())
def test_an_epoch_holds_every_block_once_side_by_side(size):
    taken = sorted(one_epoch(size))
    block, n_tokens = size["block_size"], size["n_tokens"]
    assert 0 <= taken[0] < block
    assert np.all(np.diff(taken) == block)
    assert taken[-1] + block + 1 <= n_tokens
    assert n_tokens - (taken[-1] + block + 1) < block  # no whole block is left over


@repeatable
@given(size=sizes(), before=st.integers(0, 30))
def test_a_restored_state_continues_exactly(size, before):
    straight, stopped = Sampler(**size), Sampler(**size)
    for _ in range(before):
        straight.next()
        stopped.next()
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = Sampler(**size)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert np.array_equal(offsets(straight, 20), offsets(resumed, 20))


@repeatable
@given(size=sizes(), world=st.integers(1, 4))
def test_ranks_share_the_blocks_without_overlap_or_gap(size, world):
    size["batch_size"] = max(size["batch_size"], world)
    alone = Sampler(**size)
    ranks = [Sampler(**size, rank=rank, world=world) for rank in range(world)]
    for _ in range(8):
        parts = [rank.next() for rank in ranks]
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert np.array_equal(np.concatenate(parts), alone.next())
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


@repeatable
@given(size=sizes(), other=st.integers(1, 9))
def test_the_order_does_not_depend_on_the_batch_size(size, other):
    count = size["batch_size"] * other
    regrouped = {**size, "batch_size": other}
    assert np.array_equal(
        offsets(Sampler(**size), other)[:count], offsets(Sampler(**regrouped), size["batch_size"])
    )


def test_a_batch_larger_than_the_data_wraps_over_epochs():
    sampler = Sampler(n_tokens=11, block_size=5, batch_size=9, seed=3)
    assert sampler.next().shape == (9,)
    assert sampler.epoch >= 4
    assert len(Sampler(n_tokens=6, block_size=5, batch_size=4, seed=0).next()) == 4


def test_epochs_seeds_and_starts_differ():
    sampler = Sampler(n_tokens=10_000, block_size=64, batch_size=1, seed=1)
    starts = set()
    orders = set()
    for _ in range(6):
        epoch = sampler.epoch
        taken = []
        while sampler.epoch == epoch:
            taken.append(int(sampler.next()[0]))
        orders.add(tuple(taken[:-1]))
        starts.add(taken[0] % 64)
    assert len(orders) == 6
    assert len(starts) > 2
    other = Sampler(n_tokens=10_000, block_size=64, batch_size=8, seed=2)
    first = Sampler(n_tokens=10_000, block_size=64, batch_size=8, seed=1)
    assert not np.array_equal(other.next(), first.next())


def test_the_order_never_changes_between_versions():
    """Runs are resumed across versions of numpy and of gptopt: these numbers are for ever."""
    assert shuffled(8, 1337, 0).tolist() == [0, 3, 1, 2, 5, 7, 6, 4]
    sampler = Sampler(n_tokens=100, block_size=7, batch_size=4, seed=1)
    assert sampler.next().tolist() == [26, 82, 75, 61]


def test_too_few_tokens_names_both_numbers_and_the_way_out():
    with pytest.raises(UserError) as caught:
        Sampler(n_tokens=128, block_size=128, batch_size=1, seed=0, split="val")
    message = str(caught.value)
    assert "val split has 128 tokens" in message
    assert "= 129" in message
    assert "--model.block-size" in message
    Sampler(n_tokens=129, block_size=128, batch_size=1, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": 99},
        {"block_size": 8},
        {"seed": 2},
        {"epoch": -1},
        {"epoch": "0"},
        {"position": 10**6},
        {"position": None},
    ],
)
def test_a_state_of_other_data_or_a_broken_one_is_refused(change):
    sampler = Sampler(n_tokens=100, block_size=7, batch_size=4, seed=1)
    state = {**sampler.state_dict(), **change}
    (name,) = change
    with pytest.raises(UserError, match=name):
        sampler.load_state_dict(state)
    assert sampler.state_dict()["position"] == 0
