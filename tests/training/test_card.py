"""README.md of what a run leaves behind: every number in it is the run's own."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from gptopt import cli
from gptopt.config import EvaluateOptions, TrainOptions
from gptopt.evaluate import evaluate
from gptopt.training import train
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.metrics import read_metrics
from gptopt.training.pretraining import NextToken

yaml = pytest.importorskip("yaml", reason="front matter is read with PyYAML")


def parts(path):
    """Front matter, and the text."""
    _, front, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def table_of(text, first):
    """The rows of the table whose first column is headed like this."""
    lines = text.splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def spellings(value):
    """How a card may write a number."""
    return {
        str(value), f"{value:,}", f"{value:g}", f"{value:.4f}", f"{value:,.0f}", f"{value:.4g}",
        f"{value:.3g}", f"{value:,.1f}",
    }  # fmt: skip


def numbers_of(value):
    """Every number in nested JSON."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def adapting(options, base):
    """Options of a run that trains an adapter."""
    made = options("tuned", init_from=base, lora={"rank": 2}).model_dump(by_alias=True)
    return TrainOptions.model_validate(made | {"model": {}})


def test_no_number_stands_in_a_card_that_the_run_did_not_write(options, tmp_path):
    made = options("demo", eval_every=2, eval_batches=0, model={"dropout": 0.1})
    result = train(made)
    run = tmp_path / "demo"
    lines = read_metrics(run / "metrics.jsonl")
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    index = json.loads((run / "data" / "dataset.json").read_text())
    config = json.loads(Path(result["checkpoint"], "config.json").read_text())
    written = [
        result, lines, made.model_dump(), config, index, [math.exp(loss) for loss in losses],
        [len(losses), made.batch_size, result["parameters"] / 1000],
        [result["bits_per_byte"] * loss / result["best_val_loss"] for loss in losses],
    ]  # fmt: skip
    known = {text for value in numbers_of(written) for text in spellings(value)}
    _, text = parts(run / "README.md")
    text = re.sub(r"sha256 `[0-9a-f]{64}`|`[^`]*`|gptopt [\d.]+|torch \S+", "", text)
    hardware = next(line for line in text.splitlines() if line.startswith("| hardware"))
    text = text.replace(hardware, "").replace("```", "")
    found = re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
    assert len(found) > 25
    assert not {number for number in found if number.rstrip(",") not in known}


def test_the_figures_are_those_that_its_command_measures(options, tmp_path):
    result = train(options(eval_every=3, eval_batches=0))
    (own,) = (
        row for row in table_of((tmp_path / "run/README.md").read_text(), " ")
        if row[""].startswith("**this model**")
    )  # fmt: skip
    again = evaluate(
        EvaluateOptions(
            model=result["out"],
            data=[str(tmp_path / "run/data")],
            split="val",
            device="cpu",
            json=True,
        )
    )
    assert int(own["step"]) == result["best_step"]
    assert float(own["loss"]) == pytest.approx(again["val_loss"], abs=1e-4)
    assert float(own["perplexity"]) == pytest.approx(again["perplexity"], rel=1e-4)
    assert float(own["bits per byte"]) == pytest.approx(again["bits_per_byte"], abs=1e-4)
    assert result["bits_per_byte"] == pytest.approx(again["bits_per_byte"], rel=1e-6)


def test_every_command_of_a_card_is_accepted(options, tmp_path, monkeypatch):
    base = train(options("base", steps=1))["checkpoint"]
    tuned = {"init_from": base, "lora": {"rank": 2}}
    train(
        TrainOptions.model_validate(
            options("tuned", **tuned).model_dump(by_alias=True) | {"model": {}}
        )
    )
    seen = set()
    for name in ("base", "tuned"):
        monkeypatch.chdir(tmp_path / name)
        _, text = parts(Path("README.md"))
        for command in re.findall(r"^gptopt .*|(?<=`)gptopt [^`]*(?=`)", text, re.MULTILINE):
            if " -" in command:
                verb, *arguments = shlex.split(command)[1:]
                cli.parse(verb, arguments)
                seen.add(verb)
    assert seen == {"generate", "export", "run", "evaluate", "train"}


def test_best_and_last_say_which_of_them_they_are(options, tmp_path, monkeypatch):
    losses = iter([2.0, 3.0])
    monkeypatch.setattr(NextToken, "evaluate", lambda *given: {"val_loss": next(losses)})
    result = train(options(eval_every=3, checkpoint_every=3))
    assert result["best_step"] == 3
    best, last = (
        table_of(Path(result[name], "README.md").read_text(), " ")
        for name in ("best_checkpoint", "checkpoint")
    )
    assert [(row[""], row["step"], row["loss"]) for row in best] == [
        ("**this model**, the best", "3", "2.0000"), ("the last", "6", "3.0000"),
    ]  # fmt: skip
    assert [(row[""], row["step"], row["loss"]) for row in last] == [
        ("the best", "3", "2.0000"), ("**this model**", "6", "3.0000"),
    ]  # fmt: skip
    front, _ = parts(tmp_path / "run/README.md")  # a run stands for its best checkpoint
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert {each["type"]: each["value"] for each in metrics}["loss"] == 2.0


def test_names_that_mean_something_to_yaml_or_markdown_do_no_harm(options, tmp_path):
    name = "a: [b] | `c` #d"
    train(options(name, steps=1))
    front, text = parts(tmp_path / name / "README.md")
    assert front["model-index"][0]["name"] == name
    assert text.startswith("\n# `a: [b] | 'c' #d`: a GPT of 4.")


def test_the_hub_reads_the_card(options, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    result = train(options(eval_every=3))
    card = hub.ModelCard.load(Path(result["checkpoint"], "README.md"))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "unknown"
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found["loss"] == result["best_val_loss"]
    assert found["bits_per_byte"] == result["bits_per_byte"]
    assert found["perplexity"] == pytest.approx(math.exp(result["best_val_loss"]))


def test_without_held_out_text_a_card_claims_nothing(options, tmp_path):
    result = train(options(data={"kind": "char", "val_fraction": 0.0}))
    front, text = parts(tmp_path / "run/README.md")
    assert "model-index" not in front
    assert "Nothing was held out, so nothing was measured" in text
    assert f"{result['train_loss']:.4f} nats per token" in text
    assert result["bits_per_byte"] is None


def test_a_masked_model_claims_no_perplexity(options, tmp_path, metrics_of):
    train(options(objective="masked", eval_every=3, eval_batches=0))
    front, text = parts(tmp_path / "run/README.md")
    assert front["pipeline_tag"] == "fill-mask"
    (row,) = (r for r in table_of(text, " ") if "this model" in r[""])
    line = metrics_of(tmp_path / "run")[int(row["step"])]
    assert set(row) == {"", "step", "loss", "accuracy"}
    assert row["accuracy"] == f"{line['val_accuracy']:.4f}"
    assert "15% of all" in text
    assert "<mask>" in text


@pytest.fixture
def metrics_of():
    return lambda run: {line["step"]: line for line in read_metrics(run / "metrics.jsonl")}


def test_an_adapters_card_names_its_base_and_is_pefts(options, tmp_path):
    base = train(options("base", steps=2))["checkpoint"]
    tuned = train(adapting(options, base))
    front, text = parts(Path(tuned["checkpoint"], "README.md"))
    assert front["library_name"] == "peft"
    assert front["tags"] == ["gptopt", "lora"]
    assert "base_model" not in front  # no name that the Hub knows
    told = json.loads(Path(tuned["checkpoint"], "adapter_config.json").read_text())
    assert str(tmp_path) in told["base_model_name_or_path"]
    assert str(tmp_path) not in text
    assert "base/checkpoints/step-000002" in text
    assert re.search(r"whose weights have the sha256 `[0-9a-f]{64}`", text)
    assert "of rank 2, alpha 4, on `attention`" in text
    assert "gptopt export BASE --adapter mine=THIS_FOLDER --out edge" in text


def test_a_card_may_be_edited_and_the_checkpoint_stays_whole(options, tmp_path):
    train(options())
    checkpoints = Checkpoints(tmp_path / "run")
    newest = checkpoints.newest()
    (newest / "README.md").write_text("my own words")
    assert checkpoints.newest() == newest
    (newest / "README.md").unlink()
    assert checkpoints.newest() == newest
    (newest / "notes.txt").write_text("what nobody listed")
    assert checkpoints.newest() != newest
