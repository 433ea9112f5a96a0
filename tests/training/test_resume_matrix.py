"""Exact resume after kill -9: every kind of training, wherever it is killed."""

import random

import pytest

from gptopt.bench.resume import MOMENTS, VARIANTS, Matrix, differences, moment

QUICK = {("LoRA", "mid-accumulation"), ("masked LM", "epoch boundary")}
CASES = [
    pytest.param(
        variant, kind,
        id=f"{variant}, {kind}", marks=() if (variant, kind) in QUICK else pytest.mark.slow,
    )
    for variant in VARIANTS
    for kind in MOMENTS
]  # fmt: skip


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_a_killed_run_ends_as_one_that_was_not(matrix, variant, kind):
    row = matrix.row(variant, kind, seed=0)
    assert row["differs"] == []
    assert row["equal"]


def test_kills_are_where_they_say():
    chance = random.Random(0)
    for _ in range(50):
        boundary = moment("epoch boundary", 324, 1, chance)
        before = boundary.step * 60 + boundary.micro * 30
        assert before // 324 != (before + 30) // 324
        inside = moment("mid-accumulation", 324, 2, chance)
        assert inside.micro == 1
        assert inside.step * 60 // 324 == (inside.step + 1) * 60 // 324


def test_the_comparison_is_not_blind(options, tmp_path):
    from gptopt.training import train

    train(options("a", eval_every=2))
    train(options("b", eval_every=2, weight_decay=0.2))
    found = set(differences(tmp_path / "a", tmp_path / "b"))
    assert {"model.safetensors", "fixed", "metrics.jsonl"} <= found
    assert not set(differences(tmp_path / "a", tmp_path / "a"))
