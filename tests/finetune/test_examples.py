"""The worked examples of the README: each improves its task's figure by the margin stated there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gptopt import example_data
from gptopt.config import EvaluateOptions, TrainOptions
from gptopt.config_export import ExportOptions
from gptopt.config_finetune import ClassifyOptions, SftOptions
from gptopt.evaluate import evaluate
from gptopt.export.verbs import export
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
    """base(seed, steps=120): a small model that has read Python's documentation."""
    made = {}

    def make(seed: int, steps: int = 120) -> str:
        if (seed, steps) not in made:
            out = tmp_path_factory.mktemp("base") / "run"
            options = {
                "inputs": [str(data / "text")], "out": str(out), "steps": steps, "batch_size": 16,
                "warmup_steps": 10, "eval_every": 0, "eval_batches": 5, "seed": seed,
                "data": {"vocab_size": 512}, "model": SHAPE, **COMMON, "lr": 5e-3,
            }  # fmt: skip
            train(TrainOptions.model_validate(options))
            made[seed, steps] = str(out)
        return made[seed, steps]

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


def in_two_bits(base, out, seed) -> Callable[..., float]:
    """loss(qat=..., calibration=...) of an exported file on held-out text, after more steps."""
    run = {
        "inputs": [f"{base}/data"], "init_from": base, "steps": 150, "batch_size": 16,
        "warmup_steps": 10, "eval_every": 0, "eval_batches": 1, "seed": seed, **COMMON, "lr": 2e-3,
        "min_lr": 0.0,
    }  # fmt: skip

    def loss(*, qat: bool, calibration: str | None = None) -> float:
        trained = out / ("aware" if qat else "plain")
        if not trained.exists():
            rounding = {"out": str(trained), "qat": "q2" if qat else None}
            train(TrainOptions.model_validate(run | rounding))
        edge = str(out / "edge")
        export(ExportOptions(
            model=str(trained), out=edge, precision="q2", calibration=calibration, force=True,
            json=True,
        ))  # fmt: skip
        held_out = {"data": [f"{base}/data"], "split": "val"}
        found: float = evaluate(EvaluateOptions(model=edge, **held_out, json=True))["val_loss"]
        return found

    return loss


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


@pytest.mark.slow
@pytest.mark.timeout(900)
@SEEDS
def test_files_of_two_bits_lose_less_over_three_seeds(data, base, tmp_path, seed):
    """Beside as many steps without --qat, and those in a calibrated file."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((data / "text").iterdir())))
    loss = in_two_bits(base(seed, steps=600), tmp_path, seed)
    aware = loss(qat=True)
    assert aware < loss(qat=False) - 0.1
    assert aware < loss(qat=False, calibration=str(text)) - 0.04


@pytest.mark.slow
@pytest.mark.timeout(900)
@SEEDS
def test_a_student_learns_more_from_a_teacher_over_three_seeds(base, tmp_path, seed):
    """Beside a student of as many steps on the same text alone."""
    teacher, losses = base(seed, steps=600), []
    for name, distill in (("alone", {}), ("taught", {"teacher": teacher})):
        result = train(TrainOptions.model_validate({
            "inputs": [f"{teacher}/data"], "out": str(tmp_path / name), "steps": 200,
            "batch_size": 16, "warmup_steps": 10, "eval_every": 0, "eval_batches": 0, "seed": seed,
            "model": SHAPE | {"n_layer": 1, "n_embd": 32}, "distill": distill, **COMMON,
            "lr": 5e-3,
        }))  # fmt: skip
        losses.append(result["val_loss"])
    alone, taught = losses
    assert taught < alone - 0.1
