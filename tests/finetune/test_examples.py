"""The worked examples of the README: each improves its task's figure by the margin stated there."""

from pathlib import Path

import pytest

from gptopt import example_data
from gptopt.config import TrainOptions
from gptopt.config_finetune import ClassifyOptions, SftOptions
from gptopt.finetune import classify, sft
from gptopt.training import train
from gptopt.training.metrics import read_metrics

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 96, "position": "rotary"}
COMMON = {"device": "cpu", "json": True, "checkpoint_every": 0, "lr": 3e-3}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    example_data.write(folder)
    return folder


@pytest.fixture(scope="session")
def base(data, tmp_path_factory):
    """base(seed): a small model that has read Python's documentation."""
    made = {}

    def make(seed: int) -> str:
        if seed not in made:
            out = tmp_path_factory.mktemp("base") / "run"
            options = {
                "inputs": [str(data / "text")], "out": str(out), "steps": 120, "batch_size": 16,
                "warmup_steps": 10, "eval_every": 0, "eval_batches": 5, "seed": seed,
                "data": {"vocab_size": 512}, "model": SHAPE, **COMMON, "lr": 5e-3,
            }  # fmt: skip
            train(TrainOptions.model_validate(options))
            made[seed] = str(out)
        return made[seed]

    return make


def replies(data, base, out, seed, epochs) -> tuple[float, float]:
    """Loss of held-out replies before and after."""
    common = {
        "inputs": [str(data / "questions.jsonl")], "init_from": base, "batch_size": 8,
        "overlong": "drop", "seed": seed, "eval_every": 0, **COMMON,
    }  # fmt: skip
    before = sft(SftOptions(**common | {"out": str(out / "before"), "steps": 1, "lr": 1e-9}))
    after = sft(SftOptions(**common, out=str(out / "after"), epochs=epochs))
    return before["val_loss"], after["val_loss"]


def labels(data, base, out, seed, epochs) -> tuple[float, float]:
    """Share of held-out texts of the commonest label, and of those that are labelled right."""
    result = classify(ClassifyOptions(
        inputs=[str(data / "packages.jsonl")], out=str(out / "labels"), init_from=base,
        epochs=epochs, batch_size=16, overlong="cut-end", block_size=64, seed=seed,
        eval_every=0, **COMMON,
    ))  # fmt: skip
    counts = [row["count"] for row in result["val_scores"].values()]
    return max(counts) / sum(counts), result["val_accuracy"]


def test_replies_to_questions_improve(data, base, tmp_path):
    before, after = replies(data, base(1), tmp_path, 1, epochs=1)
    assert after < before - 0.8


def test_lines_of_source_are_told_apart(data, base, tmp_path):
    commonest, right = labels(data, base(1), tmp_path, 1, epochs=1)
    assert right > commonest + 0.1


SEEDS = pytest.mark.parametrize("seed", [1, 2, 3])


@pytest.mark.slow
@SEEDS
def test_replies_improve_over_three_seeds(data, base, tmp_path, seed):
    before, after = replies(data, base(seed), tmp_path, seed, epochs=3)
    assert after < before - 0.8


@pytest.mark.slow
@SEEDS
def test_labels_improve_over_three_seeds(data, base, tmp_path, seed):
    commonest, right = labels(data, base(seed), tmp_path, seed, epochs=2)
    assert right > commonest + 0.15


@pytest.mark.slow
@SEEDS
def test_masked_tokens_are_guessed_better_over_three_seeds(data, tmp_path, seed):
    train(TrainOptions.model_validate({
        "inputs": [str(data / "text")], "out": str(tmp_path / "masked"), "objective": "masked",
        "steps": 600, "batch_size": 16, "warmup_steps": 30, "eval_every": 100, "eval_batches": 0,
        "seed": seed, "data": {"vocab_size": 512}, "model": SHAPE, **COMMON, "lr": 5e-3,
    }))  # fmt: skip
    lines = read_metrics(tmp_path / "masked/metrics.jsonl")
    found = [line["val_accuracy"] for line in lines if "val_accuracy" in line]
    assert found[-1] > found[0] + 0.05  # after 100 steps it guesses the commonest tokens
