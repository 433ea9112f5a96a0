"""gptopt merge, and --adapter of the verbs that take a model, as the command line calls them."""

import json
from pathlib import Path

import pytest
import torch

from gptopt.checkpoint import load_model
from gptopt.cli import main
from gptopt.config import TrainOptions
from gptopt.training import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny run, and a run of an adapter on it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text("the cat sat on the mat and looked at the dog. " * 60)
    common = {
        "inputs": [str(root / "text.txt")], "steps": 4, "batch_size": 3, "warmup_steps": 1,
        "eval_every": 0, "checkpoint_every": 0, "device": "cpu", "json": True,
        "data": {"kind": "char"},
    }  # fmt: skip
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    train(TrainOptions.model_validate(common | {"out": str(root / "base"), "model": shape}))
    lora = {"init_from": str(root / "base"), "lora": {"rank": 2}, "lr": 0.5, "min_lr": 0.5}
    train(TrainOptions.model_validate(common | lora | {"out": str(root / "tuned")}))
    return root


def ask(capsys, *arguments):
    """The exit code, the JSON object and the error line of a command."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json", "--quiet"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else None, err


def logits(folder, **options):
    with torch.no_grad():
        return load_model(folder, **options).model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("beside", [False, True])
def test_merge_writes_a_plain_model_that_says_the_same(runs, tmp_path, capsys, beside):
    out = tmp_path / "merged"
    model = ["base", "--adapter", runs / "tuned"] if beside else ["tuned"]
    code, said, _ = ask(capsys, "merge", runs / model[0], *model[1:], "--out", out)
    assert code == 0
    assert said["rank"] == 2
    assert said["parameters"] == load_model(runs / "base").model.num_parameters()
    expected = logits(runs / "tuned")
    assert (logits(out) - expected).abs().max() <= 2e-5 * (expected.max() - expected.min())
    assert not torch.equal(logits(runs / "base"), expected)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    code, _, error = ask(capsys, "merge", runs / "tuned", "--out", out)
    assert (code, "exists already" in error) == (2, True)


def test_merge_refuses_what_is_no_adapter_and_leaves_nothing(runs, tmp_path, capsys):
    for model in (["base"], ["base", "--adapter", runs / "base"], ["text.txt"]):
        code, _, error = ask(capsys, "merge", runs / model[0], *model[1:], "--out", tmp_path / "x")
        assert code == 2
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_generate_and_evaluate_take_an_adapter_beside_its_base_or_alone(runs, capsys):
    base, tuned = runs / "base", runs / "tuned"
    ways = ([base], [base, "--adapter", tuned], [tuned])
    prompt = ["--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "8"]
    said = [ask(capsys, "generate", *model, *prompt)[1]["text"] for model in ways]
    assert said[1] == said[2]
    data = ["--data", runs / "text.txt"]
    losses = [ask(capsys, "evaluate", *model, *data)[1]["val_loss"] for model in ways]
    assert losses[1] == losses[2] != losses[0]


def test_an_adapter_of_another_base_is_one_line_with_both_hashes(runs, tmp_path, capsys):
    from safetensors import safe_open

    (checkpoint,) = (runs / "tuned" / "checkpoints").iterdir()
    with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as file:
        told = file.metadata()["base_sha256"]
    ask(capsys, "merge", runs / "tuned", "--out", tmp_path / "other")
    code, _, error = ask(
        capsys, "generate", tmp_path / "other", "--adapter", runs / "tuned", "--prompt", "the"
    )
    assert code == 2
    assert error.count("\n") == 1
    assert told[:12] in error
    assert str(Path(runs / "base").resolve()) in error


def test_unknown_layers_are_one_line_with_the_known_ones(runs, tmp_path, capsys):
    code, _, error = ask(
        capsys, "train", runs / "text.txt", "--init-from", runs / "base", "--out", tmp_path / "x",
        "--lora.rank", "2", "--lora.targets", "q_proj", "--device", "cpu",
    )  # fmt: skip
    assert code == 2
    assert error.count("\n") == 1
    assert "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj, attention, ffn" in error
