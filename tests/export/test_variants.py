"""Several precisions and targets in one call: the folders, their reports, their refusals."""

import json

import numpy as np
import onnx
import pytest
import torch
from random_models import random_gpt

from gptopt.checkpoint import save_model
from gptopt.config_export import ExportOptions, ValidateOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.export.verbs import export, validate
from gptopt.manifest import write_manifest
from gptopt.runtime import EdgeModel
from gptopt.tokenizer import Tokenizer

PRECISIONS = ["fp32", "q4", "q8", "fp16"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model folder, and a folder exported from it in four precisions."""
    root = tmp_path_factory.mktemp("variants")
    tokenizer = Tokenizer.train(["a small text of a few words " * 30], kind="bpe", vocab_size=270)
    (root / "model").mkdir()
    save_model(root / "model", random_gpt(vocab_size=320, block_size=32), tokenizer)
    (root / "text").write_text("a small text of a few words " * 400)
    return root


@pytest.fixture(scope="module")
def edge(root):
    report = export(
        ExportOptions(
            model=str(root / "model"), out=str(root / "edge"), json=True,
            precision=",".join(PRECISIONS), keep_stages=str(root / "stages"),
        )
    )  # fmt: skip
    return root / "edge", report


def read(path):
    return json.loads(path.read_text())


def test_each_precision_is_a_file_with_its_own_proof(edge):
    folder, report = edge
    assert list(report["variants"]) == PRECISIONS
    for variant in report["variants"].values():
        assert variant["passed"]
        assert (folder / variant["file"]).is_file()
    strict = [case["case"] for case in report["variants"]["q4"]["cases"]]
    assert "prefill (unrounded inputs)" in strict
    weight = report["variants"]["q4"]["weight"]
    assert 0.01 < weight["error"] < weight["bound"]
    assert report["cases"] == report["variants"]["fp32"]["cases"]
    assert report["variants"]["fp32"]["weight"] is None


def test_the_configs_name_every_file(edge):
    folder, _ = edge
    config = read(folder / "config.json")
    told = config["gptopt_edge"]
    assert told["target"] == "portable"
    assert list(told["files"]) == PRECISIONS
    assert told["files"]["q8"] == {
        "file": "onnx/model_quantized.onnx", "cache": "shared", "cache_dtype": "float32",
        "padding": "any", "scores": "all", "tokens": "none",
    }  # fmt: skip
    assert told["files"]["fp16"]["cache_dtype"] == "float16"
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    genai = read(folder / "genai_config.json")
    assert genai["model"]["decoder"]["filename"] == "onnx/model.onnx"
    assert genai["search"]["past_present_share_buffer"] is True


def test_the_runtime_runs_each_file(edge):
    folder, _ = edge
    ids = torch.randint(0, 260, (2, 7)).numpy()
    full = EdgeModel(folder, precision="fp32").forward(ids)[0]
    for name in PRECISIONS:
        logits = EdgeModel(folder, precision=name).forward(ids)[0]
        assert np.abs(logits - full).max() < 0.35 * np.ptp(full)


def test_the_stages_are_kept_where_asked_for(edge, root):
    names = {path.name for path in (root / "stages").iterdir()}
    expected = {"lower", "clean", "fuse", "quantise-q4", "quantise-q8", "quantise-fp16"}
    assert names == {f"portable-{stage}.onnx" for stage in expected}
    nodes = {
        name: len(onnx.load(root / "stages" / f"portable-{name}.onnx").graph.node)
        for name in ("lower", "clean", "fuse")
    }
    assert nodes["lower"] > nodes["clean"] > nodes["fuse"]


def test_validate_proves_every_file_again(edge, root, capsys):
    folder, report = edge
    result = validate(ValidateOptions(folder=str(folder), model=str(root / "model")))
    assert list(result["variants"]) == PRECISIONS
    assert result["variants"]["q4"]["cases"] == report["variants"]["q4"]["cases"]
    assert "q8: onnx/model_quantized.onnx" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--precision q2: .* has fp32, q4, q8, fp16; choose"):
        validate(ValidateOptions(folder=str(folder), model=str(root / "model"), precision="q2"))


def test_validate_finds_a_spoilt_quantised_file(edge, root, tmp_path):
    import shutil

    shutil.copytree(edge[0], tmp_path / "edge")
    path = tmp_path / "edge" / "onnx" / "model_q4.onnx"
    model = onnx.load(path)
    gelu = next(node for node in model.graph.node if node.op_type == "FastGelu")
    gelu.op_type = "BiasGelu"
    onnx.save(model, path)
    write_manifest(tmp_path / "edge", "edge")
    with pytest.raises(CheckFailed, match=r"model_q4.onnx: does not say what .*unrounded inputs"):
        validate(
            ValidateOptions(
                folder=str(tmp_path / "edge"), model=str(root / "model"), precision="q4", json=True
            )
        )


def test_several_targets_are_folders_of_their_own(root):
    out = root / "many"
    report = export(
        ExportOptions(model=str(root / "model"), out=str(out), target="ort-cpu,legacy", json=True)
    )
    assert sorted(path.name for path in out.iterdir()) == ["legacy", "ort-cpu"]
    assert set(report["targets"]) == {"ort-cpu", "legacy"}
    told = read(out / "ort-cpu" / "config.json")["gptopt_edge"]
    assert (told["target"], told["files"]["fp32"]["padding"]) == ("ort-cpu", "right")
    card = (out / "ort-cpu" / "README.md").read_text()
    assert "padded on the right" in card
    with pytest.raises(UserError, match="legacy: exists already"):
        export(ExportOptions(model=str(root / "model"), out=str(out), target="web,legacy"))


def test_an_int8_cache_is_proven(root):
    report = export(
        ExportOptions(
            model=str(root / "model"), out=str(root / "int8"), target="ort-cpu", cache="int8",
            calibration=str(root / "text"), json=True,
        )
    )  # fmt: skip
    assert report["passed"]
    config = read(root / "int8" / "config.json")
    assert config["gptopt_edge"]["files"]["fp32"]["cache_dtype"] == "int8"
    assert any("unrounded" in case["case"] for case in report["cases"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "mobile"}, "--target: found 'mobile', expected one or more of portable"),
        ({"precision": "q5"}, "--precision: found 'q5', expected one or more of fp32"),
        ({"target": "legacy", "precision": "q4"}, "--precision q4: --target legacy has fp32; q4 "),
        ({"cache": "int8"}, "--cache int8: needs a text .* give --calibration TEXT"),
    ],
)
def test_what_cannot_be_is_one_line(options, message, root, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        export(ExportOptions(model=str(root / "model"), out=str(tmp_path / "x"), **options))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
