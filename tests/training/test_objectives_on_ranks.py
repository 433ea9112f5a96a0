"""Two ranks on the CPU learn masked tokens, packed replies and labels as one rank does."""

import contextlib
import json

import pytest
import torch
from rank import in_float64, results

from gptopt.config_finetune import ClassifyOptions, SftOptions
from gptopt.finetune import classify, sft
from gptopt.training import train
from gptopt.training.metrics import read_metrics

LENGTHS = (3, 9, 1, 5, 2, 14, 4, 1, 7, 6, 3, 11, 2, 8, 5, 1, 4, 10, 2)  # of texts, in words
WORDS = ("the cat sat on the mat and looked at the dog. " * 2).split()
LABELS = ("often", "often", "often", "often", "rarely", "never")  # imbalanced


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """Texts and replies of many lengths, an odd number of them."""
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    records = []
    for number, length in enumerate(LENGTHS):
        words = WORDS[number : number + length]
        some = sorted({LABELS[number % 6], LABELS[number * 5 % 6]})[: number % 3]
        records.append({
            "prompt": " ".join(words[: number % 4]) or "so ", "completion": " ".join(words),
            "text": " ".join(words), "label": LABELS[number % 6], "some": some,
        })  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def run_of(options, examples, tmp_path):
    """run_of(objective): the verb, and options(out, **changes) of a small run of it."""
    base = tmp_path / "base"
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "block_size": 64}

    def text(out, **changes):
        return options(out, objective="masked", mask_rate=0.02, model=shape, **changes)

    def finetuned(kind, **own):
        if not base.exists():
            train(options("base", steps=1, model=shape, eval_batches=0, checkpoint_every=0))
        common = options().model_dump(include={
            "steps", "batch_size", "warmup_steps", "eval_every", "checkpoint_every", "log_every",
            "seed", "device",
        })  # fmt: skip
        common |= {"inputs": [str(examples)], "init_from": str(base), "json": True, "lr": 1e-2}
        return lambda out, **changes: kind.model_validate(
            common | own | {"out": str(tmp_path / out)} | changes
        )

    def chosen(objective):
        labels = {"class_weights": "balanced"}
        match objective:
            case "masked tokens":
                return train, text
            case "replies":
                return sft, finetuned(SftOptions)
            case "a label":
                return classify, finetuned(ClassifyOptions, **labels)
        several = {"label_field": "some", "multi_label": True, "pooling": "mean"}
        return classify, finetuned(ClassifyOptions, **labels, **several)

    return chosen


def losses(run):
    return torch.tensor([line["loss"] for line in read_metrics(run / "metrics.jsonl")]).double()


OBJECTIVES = pytest.mark.parametrize(
    "objective", ["masked tokens", "replies", "a label", "several labels"]
)
BOTH = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


@BOTH
@OBJECTIVES
@pytest.mark.parametrize("kind", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_two_ranks_learn_as_one(run_of, tmp_path, ranks, objective, parallel, kind):
    """One sequence each at a time: at most steps one rank has more to learn, or nothing at all."""
    verb, options = run_of(objective)
    wide = kind == "float64"
    common = {"steps": 12, "accumulate": 3, "eval_batches": 0}
    with in_float64() if wide else contextlib.nullcontext():
        one = verb(options("one", **common, batch_size=2))
    chosen = options("two", **common, batch_size=1, parallel=parallel)
    two, other = results(ranks.train(chosen, **({"float64": {}} if wide else {})))
    assert two == other
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(found) == 12
    close = {"rtol": 0, "atol": 1e-6} if wide else {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(found, expected, **close)
    for key in ("tokens", "steps", "skipped", "parameters", "val_accuracy"):
        assert two.get(key) == one.get(key), key
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "parallel"), [("replies", "fsdp"), ("a label", "ddp"), ("masked tokens", "fsdp")]
)
def test_two_ranks_go_on_with_what_one_began_and_leave_it_to_one(
    run_of, tmp_path, ranks, objective, parallel
):
    """Five sequences a step, of which two ranks have two and three."""
    verb, options = run_of(objective)
    common = {"steps": 9, "batch_size": 5, "schedule": "constant", "checkpoint_every": 3}
    verb(options("straight", **common))
    verb(options("run", **common | {"steps": 3}))
    spread = common | {"parallel": parallel, "resume": True}
    (two, _) = results(ranks.train(options("run", **spread | {"steps": 6})))
    assert (two["resumed_from"], two["steps"]) == (3, 6)
    one = verb(options("run", **common, resume=True))
    assert (one["resumed_from"], one["steps"]) == (6, 9)
    expected, found = losses(tmp_path / "straight"), losses(tmp_path / "run")
    assert len(found) == 9
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    states = [json.loads((tmp_path / run / "checkpoints/step-000009/state.json").read_text())
              for run in ("straight", "run")]  # fmt: skip
    assert states[0]["train"]["sampler"] == states[1]["train"]["sampler"]
