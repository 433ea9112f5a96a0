"""Several data folders as one: shares, blocks that cross nothing, exact positions, mistakes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptopt.config import DataOptions, TokenizeOptions
from gptopt.data import Mixture, Sampler, open_dataset, tokenize
from gptopt.data.mixture import MixtureSampler, parse_weights
from gptopt.errors import UserError

SIZES = (50, 91, 33)
STARTS = (0, 50, 141)


def sampler(weights=(0.5, 0.3, 0.2), batch_size=4, seed=7, rank=0, world=1, block=8):
    parts = [Sampler(size, block, 1, seed + at) for at, size in enumerate(SIZES)]
    return MixtureSampler(parts, STARTS, weights, batch_size, rank, world)


def sources(offsets):
    return np.searchsorted(STARTS, offsets, side="right") - 1


@settings(max_examples=40, deadline=None)
@given(
    raw=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    batches=st.integers(1, 60),
    batch_size=st.integers(1, 7),
)
def test_after_any_number_of_sequences_each_source_has_given_its_share(raw, batches, batch_size):
    weights = np.array(raw) / sum(raw)
    mixed = sampler(weights.tolist(), batch_size)
    taken = np.concatenate([mixed.take() for _ in range(batches)])
    counts = np.bincount(sources(taken), minlength=3)
    assert (np.abs(counts - weights * len(taken)) < 2).all()


def test_no_block_crosses_from_one_source_into_the_next():
    mixed = sampler()
    for _ in range(40):
        for offset in mixed.next():
            source = int(sources(offset))
            assert STARTS[source] <= offset
            assert offset + 8 < STARTS[source] + SIZES[source]


def test_a_source_gives_each_of_its_blocks_once_before_any_twice():
    mixed = sampler(weights=(0.2, 0.5, 0.3))
    taken = np.concatenate([mixed.take() for _ in range(15)])
    second = taken[sources(taken) == 1][:10]
    assert len(set(second.tolist())) == 10
    assert all(b - a >= 8 for a, b in pairwise(sorted(second)))


@pytest.mark.parametrize("done", [0, 1, 9])
def test_a_saved_position_goes_on_exactly(done):
    one, other = sampler(), sampler()
    for _ in range(done):
        one.take()
    other.load_state_dict(one.state_dict())
    for _ in range(20):
        assert np.array_equal(one.take(), other.take())
    assert one.position == other.position == 4 * (done + 20)


def test_ranks_share_what_one_would_take():
    whole = sampler()
    ranks = [sampler(rank=rank, world=3) for rank in range(3)]
    for _ in range(12):
        parts = [each.next() for each in ranks]
        assert np.array_equal(np.concatenate(parts), whole.next())


@pytest.mark.parametrize("state", [{}, {"weights": [0.5, 0.3, 0.2]}, "weights", "seed", "taken"])
def test_a_position_of_another_run_is_refused(state):
    if state == "weights":
        state = sampler(weights=(0.4, 0.4, 0.2)).state_dict()
    elif state == "seed":
        state = sampler(seed=8).state_dict()
    elif state == "taken":
        state = sampler().state_dict() | {"taken": [1, "two", 3]}
    with pytest.raises(UserError, match="the saved data position has"):
        sampler().load_state_dict(state)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a,b", "expected numbers"),
        ("0.5", "1 weights for 2 inputs"),
        ("0.5,0.4", "sum to 0.9, expected 1"),
        ("1.0,0.0", "weights above 0"),
        ("nan,1", "weights above 0"),
    ],
)
def test_weights_that_are_none(text, named):
    with pytest.raises(UserError, match=named):
        parse_weights(text, ["a", "b"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two data folders of one tokenizer, and one of another."""
    made = tmp_path_factory.mktemp("mixture")
    texts = {"one": "the cat sat on the mat. " * 60, "two": "a dog ran to the door! " * 90}
    for name, text in texts.items():
        (made / f"{name}.txt").write_text(text)

    def write(name, source, **more):
        options = TokenizeOptions(
            inputs=[str(made / f"{source}.txt")], out=str(made / name), vocab_size=280, json=True,
            **more,
        )  # fmt: skip
        tokenize(options)
        return made / name

    one = write("data-one", "one")
    two = write("data-two", "two", tokenizer=str(one))
    return one, two, write("data-other", "two"), made / "one.txt"


def test_splits_lie_one_behind_the_other(folders):
    one, two, *_ = folders
    mixed = open_dataset([str(one), str(two)], DataOptions())
    assert isinstance(mixed, Mixture)
    alone = [open_dataset([str(folder)], DataOptions()) for folder in (one, two)]
    for name in ("train", "val"):
        parts = [each.split(name) for each in alone]
        joined = mixed.split(name)
        expected = np.concatenate([part.read(0, len(part)) for part in parts])
        assert np.array_equal(joined.read(0, len(joined)), expected)
        assert len(joined) == len(expected)
    sizes = [len(each.train) for each in alone]
    assert np.allclose(mixed.weights, np.array(sizes) / sum(sizes))
    taken = mixed.sampler(8, 4, 3, 0, 1).next()
    assert mixed.train.batch(taken, 8).shape == (4, 9)


def test_order_and_weights_are_part_of_the_identity(folders):
    one, two, *_ = (str(folder) for folder in folders)
    shas = {
        open_dataset(inputs, DataOptions(), mix=mix).sha256
        for inputs, mix in [([one, two], "0.5,0.5"), ([two, one], "0.5,0.5"), ([one, two], None)]
    }
    assert len(shas) == 3


def test_folders_that_do_not_go_together_are_named(folders):
    one, _, other, text = (str(folder) for folder in folders)
    with pytest.raises(UserError, match="data-other: was tokenised with another tokenizer"):
        open_dataset([one, other], DataOptions())
    for mix in (None, "0.5,0.5"):
        with pytest.raises(UserError, match=r"one\.txt: is text, and only data folders"):
            open_dataset([one, text], DataOptions(), mix=mix)
    with pytest.raises(UserError, match="fewer than the 100001 of one block"):
        open_dataset([one, one], DataOptions()).sampler(100_000, 4, 1, 0, 1)


def test_a_run_learns_from_both(folders, tmp_path):
    pytest.importorskip("torch")
    from gptopt.config import TrainOptions
    from gptopt.training import train

    one, two, *_ = (str(folder) for folder in folders)
    values = {
        "inputs": [one, two], "mix": "0.25,0.75", "steps": 4, "batch_size": 4, "warmup_steps": 1,
        "eval_every": 0, "eval_batches": 1, "checkpoint_every": 2, "device": "cpu", "json": True,
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}, "schedule": "constant",
    }  # fmt: skip
    whole = train(TrainOptions(out=str(tmp_path / "whole"), **values))
    train(TrainOptions(out=str(tmp_path / "parts"), **values | {"steps": 2}))
    part = train(TrainOptions(out=str(tmp_path / "parts"), resume=True, **values))
    assert part["resumed_from"] == 2
    assert part["val_loss"] == whole["val_loss"]
    with pytest.raises(UserError, match="another data"):
        train(
            TrainOptions(
                out=str(tmp_path / "parts"), resume=True, **values | {"mix": "0.5,0.5", "steps": 6}
            )
        )
