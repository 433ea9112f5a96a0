"""Packing: every example whole in one block, few blocks, and no example sees another."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptopt.checkpoint import load_model
from gptopt.finetune.examples import Example, Examples, hold_out
from gptopt.finetune.packing import Packed, pack


def examples(*parts):
    """Examples given as (prompt ids, reply ids)."""
    made = [Example([*p, *r], [False] * len(p) + [True] * len(r), []) for p, r in parts]
    return Examples(iter(made), lambda: 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_every_example_is_in_one_block_and_no_block_overflows(lengths):
    blocks = pack(np.array(lengths), 50)
    assert sorted(index for block in blocks for index in block) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in block) <= 50 for block in blocks)
    # Best fit: no two blocks could have been one.
    rooms = sorted(50 - sum(lengths[index] for index in block) for block in blocks)
    assert len(rooms) < 2 or rooms[-1] + rooms[-2] <= 50 or len(blocks) == 1


def test_packing_fills_blocks_well():
    lengths = np.random.default_rng(0).integers(10, 400, 3000)
    blocks = pack(lengths, 1024)
    assert len(blocks) <= 1.02 * -(-int(lengths.sum()) // 1024)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
        {"position": "alibi"},
        {"position": "sinusoidal", "n_head": 4, "n_kv_head": 2},
    ],
    ids=["learned", "rotary", "alibi", "sinusoidal"],
)
def test_a_packed_block_says_of_each_example_what_it_says_of_it_alone(make_base, shape):
    model = load_model(make_base(**shape)).model.double()
    held = examples(([5, 6, 7], [8, 9]), ([11], [12, 13, 14]), ([20, 21], [22]))
    packed = Packed(held, np.arange(3), 12, pad_id=0)
    assert len(packed) == 1
    assert packed.counts.tolist() == [6]
    assert packed.tokens.tolist() == [4 + 3 + 2]
    inputs = {name: torch.from_numpy(value) for name, value in packed.batch(np.array([0])).items()}
    together = model(**inputs).loss.item() * 6
    alone = 0.0
    for index in range(3):
        one = Packed(held, np.array([index]), 12, pad_id=1).batch(np.array([0]))
        ids = torch.from_numpy(one["ids"])[:, : int(held.lengths[index]) - 1]
        targets = torch.from_numpy(one["targets"])[:, : ids.shape[1]]
        alone += model(ids, targets).loss.item() * int((targets != -100).sum())
    assert together == pytest.approx(alone, rel=1e-12)


def test_without_document_boundaries_the_same_block_says_something_else(make_base):
    model = load_model(make_base()).model.double()
    held = examples(([5, 6, 7], [8, 9]), ([11], [12, 13, 14]))
    batch = Packed(held, np.arange(2), 12, pad_id=0).batch(np.array([0]))
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    right = model(**inputs).loss.item()
    leaking = model(inputs["ids"], inputs["targets"]).loss.item()
    assert abs(leaking - right) > 1e-6


def test_only_replies_are_asked_for():
    batch = Packed(examples(([5, 6], [7, 8])), np.array([0]), 5, pad_id=0).batch(np.array([0]))
    assert batch["ids"].tolist() == [[5, 6, 7, 0, 0]]
    assert batch["targets"].tolist() == [[-100, 7, 8, -100, -100]]
    assert batch["doc_ids"].tolist() == [[0, 0, 0, -1, -1]]


def test_what_is_held_out_does_not_depend_on_chance():
    train, val = hold_out(50, 0.1)
    assert len(val) == 5
    assert sorted([*train, *val]) == list(range(50))
    assert hold_out(50, 0.1)[1].tolist() == val.tolist()
    assert [len(part) for part in hold_out(2, 0.01)] == [1, 1]
    assert [len(part) for part in hold_out(3, 0.0)] == [3, 0]
