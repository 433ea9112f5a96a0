"""`gptopt export` and `gptopt validate`, called as the command line calls them."""

import json

import onnx
import pytest
from random_models import random_gpt

from gptopt.checkpoint import save_model
from gptopt.cli import main
from gptopt.config_export import ExportOptions, ValidateOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.export.verbs import export, validate
from gptopt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder and the folder exported from it."""
    root = tmp_path_factory.mktemp("verbs")
    tokenizer = Tokenizer.train(["a small text of a few words " * 30], kind="bpe", vocab_size=270)
    for name, seed in (("model", 0), ("other", 1)):
        (root / name).mkdir()
        save_model(root / name, random_gpt(seed, vocab_size=320, block_size=32), tokenizer)
    (root / "deeper").mkdir()
    deeper = random_gpt(vocab_size=320, block_size=32, n_layer=3)
    save_model(root / "deeper", deeper, tokenizer)
    report = export(ExportOptions(model=str(root / "model"), out=str(root / "edge"), json=True))
    return root, report


def test_export_returns_its_report_and_prints_nothing_for_json(folders, capsys):
    root, report = folders
    assert report["out"] == str(root / "edge")
    assert report["passed"] is True
    assert json.loads(json.dumps(report)) == report
    written = json.loads((root / "edge" / "report.json").read_text())
    assert {**written, "out": report["out"]} == report
    assert capsys.readouterr().out == ""


def test_validate_shows_a_table(folders, capsys):
    root, report = folders
    result = validate(ValidateOptions(folder=str(root / "edge"), model=str(root / "model")))
    assert result["cases"] == report["cases"]
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["prefill", "batch", "decode"]
    assert "greedy tokens agreeing: 29 of 29" in shown
    assert "FAILED" not in shown


def test_validate_refuses_another_model_with_the_table(folders, capsys):
    root, _ = folders
    with pytest.raises(CheckFailed, match="prefill: logit error") as caught:
        validate(ValidateOptions(folder=str(root / "edge"), model=str(root / "other")))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert "FAILED" in capsys.readouterr().out


def test_validate_refuses_a_model_of_other_sizes(folders):
    root, _ = folders
    with pytest.raises(UserError, match=r"exported from a model with n_layer=2, .* has 3"):
        validate(ValidateOptions(folder=str(root / "edge"), model=str(root / "deeper")))


def test_validate_refuses_a_changed_folder(folders, tmp_path):
    import shutil

    root, _ = folders
    shutil.copytree(root / "edge", tmp_path / "edge")
    config = tmp_path / "edge" / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    with pytest.raises(CheckFailed, match=r"config.json: its sha256 differs"):
        validate(ValidateOptions(folder=str(tmp_path / "edge"), model=str(root / "model")))


def test_export_refuses_an_existing_folder_before_it_reads_the_model(folders):
    root, _ = folders
    with pytest.raises(UserError, match="exists already"):
        export(ExportOptions(model="no such model", out=str(root / "edge")))


def test_stages_and_chosen_tokens_are_asked_for_on_the_command_line(folders, tmp_path, capsys):
    root, _ = folders
    edge, stages = tmp_path / "edge", tmp_path / "stages"
    arguments = ["export", str(root / "model"), "--out", str(edge), "--keep-stages", str(stages)]
    assert main([*arguments, "--tokens", "greedy", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["next_tokens"]["agreeing"] == report["next_tokens"]["tokens"] > 0
    outputs = [value.name for value in onnx.load(edge / "onnx" / "model.onnx").graph.output]
    assert (outputs[0], outputs[-1]) == ("logits", "next_tokens")
    names = {path.name for path in stages.iterdir()}
    assert names == {
        f"portable-{stage}.onnx" for stage in ("lower", "clean", "fuse", "next-token")
    }  # fmt: skip
    assert main([*arguments[:4], "--tokens", "likeliest"]) == 2
    assert "--tokens" in capsys.readouterr().err
