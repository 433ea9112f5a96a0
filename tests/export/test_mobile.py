"""Files for phones: the same numbers to the bit, what a small build needs, and what is refused."""

import json
import re
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from random_models import random_gpt

from gptopt.checkpoint import save_model
from gptopt.config_export import ExportOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.export import mobile
from gptopt.export.samples import PHONES, SAMPLES
from gptopt.export.verbs import export
from gptopt.runtime import EdgeModel
from gptopt.runtime.variants import EdgeFile
from gptopt.tokenizer import Tokenizer

OPERATORS = "mobile/required_operators_and_types.config"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["a small text of a few words " * 30], kind="bpe", vocab_size=270)
    save_model(folder, random_gpt(n_layer=1, vocab_size=320, block_size=32), tokenizer)
    return folder


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("edge") / "edge"
    options = ExportOptions(
        model=str(model), out=str(out), precision="fp32,q4,fp16", ort_mobile=True, json=True
    )
    return out, export(options)


def test_each_precision_has_an_ort_file_of_the_same_numbers(exported):
    folder, report = exported
    names = ["mobile/model.ort", "mobile/model_q4.ort", "mobile/model_fp16.ort"]
    assert list(report["mobile"]["files"]) == names
    for name, told in report["mobile"]["files"].items():
        assert told["bytes"] == (folder / name).stat().st_size
        assert told["equal"]
        assert told["compared_numbers"] > 2 * 7 * 320
    edge, ids = EdgeModel(folder), np.array([[5, 7, 200]])
    phone = onnxruntime.InferenceSession(folder / "mobile/model.ort")
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": [[0, 1, 2]]}
    for value in phone.get_inputs()[3:]:
        feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    np.testing.assert_allclose(phone.run(["logits"], feed)[0], edge.forward(ids)[0], atol=1e-5)


def test_the_operators_are_those_of_the_files(exported):
    folder, report = exported
    text = (folder / OPERATORS).read_text()
    assert str(folder) not in text
    assert text.startswith("# What model.ort, model_q4.ort, model_fp16.ort need")
    named = set(re.findall(r"[;,]([A-Z]\w+)", re.sub(r"\{.*?\}\}", "", text)))
    assert report["mobile"]["operators"] == len(named)
    needed = {each.rpartition(".")[2] for each in report["variants"]["q4"]["graph"]["operators"]}
    assert {"GroupQueryAttention", "MatMulNBits", "SkipLayerNormalization"} <= named & needed
    assert '"float"' in text


def test_the_folder_holds_samples_for_phones_and_is_accepted(exported):
    folder, _ = exported
    found = {path.name for path in (folder / "samples").iterdir()}
    assert found == {*SAMPLES, *PHONES}
    for name in PHONES:
        assert "UNTESTED" in (folder / "samples" / name).read_text()[:200]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {OPERATORS, "mobile/model_q4.ort"} <= manifest["files"].keys()
    assert EdgeModel(folder, precision="q4").precision == "q4"


def test_a_conversion_that_changes_numbers_is_no_folder(exported, tmp_path, monkeypatch):
    folder, _ = exported
    (tmp_path / "onnx").mkdir()
    for name in ("model.onnx", "model_fp16.onnx"):
        shutil.copy(folder / "onnx" / name, tmp_path / "onnx" / name)
    convert = mobile._convert
    monkeypatch.setattr(
        mobile, "_convert", lambda source, path: convert(source.with_name("model_fp16.onnx"), path)
    )
    with pytest.raises(CheckFailed, match=r"^model.ort: logits of call 0 is not that of mod"):
        mobile.write_mobile(tmp_path, [EdgeFile()])


def test_what_an_ort_file_cannot_hold_is_one_line_and_no_folder(model, tmp_path, monkeypatch):
    monkeypatch.setattr(mobile, "_LARGEST", 50_000)
    options = ExportOptions(model=str(model), out=str(tmp_path / "edge"), ort_mobile=True)
    with pytest.raises(UserError, match=r"^--ort-mobile: model.onnx has [\d,]+ bytes with its we"):
        export(options)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_no_phone_runs_is_refused(model, tmp_path):
    options = ExportOptions(
        model=str(model), out=str(tmp_path / "edge"), target="ort-cuda", precision="fp16",
        ort_mobile=True,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^--ort-mobile: --target ort-cuda is for CUDAExecution"):
        export(options)
