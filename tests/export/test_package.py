"""The exported folder: its files, what stands in them, and that nothing is left of a failure."""

import dataclasses
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from random_models import random_gpt

import gptopt.export.package as package
from gptopt.config import SamplingOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.export import export_model, prove
from gptopt.export.bisect import locate
from gptopt.export.targets import GROWING, PORTABLE
from gptopt.manifest import verify_manifest
from gptopt.precisions import find_precisions
from gptopt.runtime import EdgeModel
from gptopt.runtime.folder import file_marks
from gptopt.runtime.variants import choose
from gptopt.tokenizer import Tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog and runs away from the fox " * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXT, kind="bpe", vocab_size=290)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """A GPT-2 of padded vocabulary, weights beside the graph: (model, folder, report)."""
    model = random_gpt(vocab_size=320, tie_head=True)
    folder = tmp_path_factory.mktemp("exported") / "edge"
    beside = dataclasses.replace(PORTABLE, inline_limit_bytes=0)
    return model, folder, export_model(model, tokenizer, folder, target=beside)


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_the_folder_holds_these_files_and_a_manifest_of_them(exported):
    _, folder, report = exported
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "genai_config.json",
        "manifest.json", "onnx/model.onnx", "onnx/model.onnx_data", "report.json",
        "samples/index.html", "samples/run.cpp", "samples/run.mjs", "samples/run.py",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert set(verify_manifest(folder, "edge")["files"]) == names - {"manifest.json"}
    assert (
        report["files"]["onnx/model.onnx_data"]
        == (folder / "onnx" / "model.onnx_data").stat().st_size
    )


def test_a_proof_writes_nothing_into_the_folder_and_finds_its_data(tmp_path, monkeypatch):
    """Twins lie elsewhere, for a folder may be in use, or not be one's own."""
    from gptopt.export import bisect, twin

    model = random_gpt(vocab_size=64, block_size=16, n_layer=1)
    beside = dataclasses.replace(PORTABLE, inline_limit_bytes=0)
    plan = package.Plan(find_precisions("fp16,q8"))
    export_model(model, None, tmp_path / "edge", target=beside, plan=plan)
    before, written, save = file_marks(tmp_path / "edge"), [], twin.save_scratch

    def watched(graph, path):
        written.append(path)
        assert file_marks(tmp_path / "edge") == before
        save(graph, path)

    monkeypatch.setattr(twin, "save_scratch", watched)
    monkeypatch.setattr(bisect, "save_scratch", watched)
    for precision in plan.precisions:
        _, file = choose(tmp_path / "edge", precision.name)
        path = tmp_path / "edge" / file.file
        assert prove(path, model, cases=["prefill"], file=file).passed
        assert locate(path, model, file=file) is None
    assert len(written) == 6
    assert not any(path.exists() for path in written)
    assert file_marks(tmp_path / "edge") == before


def test_the_runtime_says_what_the_model_says(exported, tokenizer):
    model, folder, _ = exported
    edge = EdgeModel(folder)
    ids = torch.randint(0, 290, (2, 9))
    with torch.no_grad():
        wanted = model(ids).logits.numpy()
    np.testing.assert_allclose(edge.forward(ids.numpy())[0], wanted, atol=1e-4)
    prompt = ids[:1, :4].tolist()
    sampling = SamplingOptions(max_new_tokens=24, temperature=0)
    said = edge.generate(prompt, sampling, end_ids=())[0]
    with torch.no_grad():
        plain = model(torch.tensor([prompt[0] + said])).logits[0, 3:-1, : tokenizer.size]
    assert said == plain.argmax(-1).tolist()


def test_weights_beside_the_graph_take_their_own_bytes_and_no_more(exported):
    model, folder, report = exported
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
    beyond = report["files"]["onnx/model.onnx_data"] - 4 * model.num_parameters()
    assert -4096 <= beyond <= 4096 * len(graph.initializer)  # small ones lie in the graph
    places = {
        entry.value
        for weight in graph.initializer
        for entry in weight.external_data
        if entry.key == "location"
    }
    assert places == {"model.onnx_data"}
    onnx.checker.check_model(folder / "onnx" / "model.onnx", full_check=True)


def test_config_names_a_type_that_clients_know_and_what_the_model_really_is(exported, tokenizer):
    model, folder, _ = exported
    config = read(folder, "config.json")
    assert config["model_type"] == "gpt2"
    assert (config["n_layer"], config["n_head"], config["n_embd"]) == (2, 4, 32)
    assert config["vocab_size"] == 320
    assert config["eos_token_id"] == tokenizer.eos_id
    assert config["transformers.js_config"] == {
        "dtype": "fp32",
        "use_external_data_format": {"model.onnx": 1},
    }
    assert config["gptopt"] == {**model.config.model_dump(), "tokenizer_size": tokenizer.size}


def test_generation_and_genai_configs(exported, tokenizer):
    _, folder, _ = exported
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    assert read(folder, "generation_config.json") == ids
    genai = read(folder, "genai_config.json")
    model, decoder = genai["model"], genai["model"]["decoder"]
    assert model["type"] == "decoder"
    assert ids.items() <= model.items()
    assert (model["vocab_size"], model["context_length"]) == (320, 136)
    assert (folder / decoder["filename"]).is_file()
    assert decoder["head_size"] * decoder["num_attention_heads"] == decoder["hidden_size"] == 32
    assert genai["search"]["past_present_share_buffer"] is True
    graph = onnx.load(folder / decoder["filename"], load_external_data=False).graph
    inputs = {value.name for value in graph.input}
    for i in range(decoder["num_hidden_layers"]):
        assert decoder["inputs"]["past_key_names"] % i in inputs
        assert decoder["inputs"]["past_value_names"] % i in inputs


def test_tokenizer_config_is_one_that_old_clients_read(exported):
    config = read(exported[1], "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 136


def test_report_and_card_hold_the_proof(exported):
    model, folder, report = exported
    assert read(folder, "report.json") == report
    assert report["passed"] is True
    assert 0 < report["max_abs_error"] <= report["budget"]
    assert report["parameters"] == model.num_parameters()
    assert {case["case"] for case in report["cases"]} >= {"left padding", "rewind", "greedy"}
    assert set(report["seconds"]) == {"trace", "lower", "clean", "fuse", "write", "prove"}
    card = (folder / "README.md").read_text()
    for case in report["cases"]:
        row = f"| {case['case']} | {case['positions']} | {case['max_abs_error']:.1e} |"
        assert row in card
    assert f"{report['greedy']['agreeing']} of {report['greedy']['tokens']} tokens" in card


def test_a_model_that_is_neither_gpt2_nor_llama_declares_the_nearest(tmp_path):
    model = random_gpt(position="alibi", n_kv_head=2, block_size=16)
    export_model(model, None, tmp_path / "edge")
    config = read(tmp_path / "edge", "config.json")
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] == 2
    assert config["gptopt"]["position"] == "alibi"
    assert config["gptopt"]["tokenizer_size"] == 2048
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    names = {path.name for path in (tmp_path / "edge").rglob("*")}
    assert not names & {"genai_config.json", "tokenizer.json", "model.onnx_data"}


@pytest.fixture
def spoiled(gpt2, monkeypatch):
    """A model, while the exporter makes a graph whose last block is wrong."""
    model, path = gpt2

    def wrong(model, config, build):
        build.target = GROWING
        graph = ir.load(path)
        weight = graph.graph.initializers["blocks.1.ffn.down.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.01))
        return graph

    monkeypatch.setattr(package, "build_graph", wrong)
    return model


def test_a_failed_proof_leaves_its_report_alone(spoiled, tmp_path):
    with pytest.raises(CheckFailed) as caught:
        export_model(spoiled, None, tmp_path / "edge")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'edge'}: not written")
    assert "prefill: logit error" in message
    assert "budget" in message
    assert "token 0 of row 0" in message
    assert "\n" not in message
    (path,) = tmp_path.iterdir()
    assert message.endswith(f"; see {path}")
    report = read(tmp_path, "edge.failed-report.json")
    assert (report["passed"], report["failed"]) == (False, "fp32")
    assert report["departure"]["layer"] == 1
    assert report["departure"]["compared"] == "stored blocks.1.ffn.down.weight"
    failed = [case for case in report["variants"]["fp32"]["cases"] if not case["passed"]]
    assert failed[0]["case"] == "prefill"


def test_the_report_of_a_failure_goes_when_the_export_succeeds(tmp_path):
    (tmp_path / "edge.failed-report.json").write_text("{}")
    export_model(random_gpt(block_size=16, vocab_size=64), None, tmp_path / "edge")
    assert [path.name for path in tmp_path.iterdir()] == ["edge"]


def test_a_failed_proof_keeps_the_folder_that_was_there(spoiled, tmp_path):
    edge = tmp_path / "edge"
    edge.mkdir()
    (edge / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        export_model(spoiled, None, edge)
    with pytest.raises(CheckFailed):
        export_model(spoiled, None, edge, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edge", "edge.failed-report.json"]
    assert (edge / "mine").read_text() == "kept"


def test_a_tokenizer_that_is_too_large_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"the tokenizer has \d+ ids, GPT only 64"):
        export_model(random_gpt(vocab_size=64), tokenizer, tmp_path / "edge")
