"""Folders that are wrong on purpose for some client: proving again finds each and names the key."""

import dataclasses
import json
import shutil

import pytest
from random_models import random_gpt

from gptopt.checkpoint import save_model
from gptopt.config_export import ExportOptions, ValidateOptions
from gptopt.errors import CheckFailed
from gptopt.export import package, targets
from gptopt.export.verbs import export, validate
from gptopt.manifest import write_manifest
from gptopt.tokenizer import Tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model folder, and what was exported from it, weights beside the graph."""
    root = tmp_path_factory.mktemp("folders")
    text = ["a small text of a few words and letters " * 30]
    tokenizer = Tokenizer.train(text, kind="bpe", vocab_size=280).with_chat_template(TEMPLATE)
    (root / "model").mkdir()
    save_model(root / "model", random_gpt(vocab_size=320, block_size=32), tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        beside = dataclasses.replace(targets.PORTABLE, inline_limit_bytes=0)
        patch.setitem(targets.TARGETS, "portable", beside)
        export(ExportOptions(model=str(root / "model"), out=str(root / "edge"), json=True))
    return root


def edit(name, change):
    def mutate(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return mutate


def genai(change):
    return edit("genai_config.json", lambda values: change(values["model"], values["search"]))


def cut_merges(values):
    del values["model"]["merges"][-2:]


MUTANTS = {
    "template not inlined": (
        edit("tokenizer_config.json", lambda v: v.pop("chat_template")), "chat_template"),
    "another template inlined": (
        edit("tokenizer_config.json", lambda v: v.update(chat_template="x")), "chat_template"),
    "tokenizer merges cut": (edit("tokenizer.json", cut_merges), "not the tokenizer of"),
    "cache shared with an attention that grows it": (
        edit("config.json", lambda v: v["gptopt_edge"]["files"]["fp32"].update(cache="growing")),
        "past_present_share_buffer is True, expected False"),
    "genai type gpt2": (
        genai(lambda m, s: m.update(type="gpt2")), "model.type is 'gpt2', expected decoder"),
    "genai sizes of another model": (
        genai(lambda m, s: m["decoder"].update(head_size=16)), "head_size is 16, expected 8"),
    "genai context of another model": (
        genai(lambda m, s: m.update(context_length=4096)), "context_length is 4096, expected 32"),
    "genai does not share": (
        genai(lambda m, s: s.update(past_present_share_buffer=False)), "share_buffer is False"),
    "external data undeclared": (
        edit("config.json", lambda v: v["transformers.js_config"].pop("use_external_data_format")),
        "use_external_data_format is {}"),
    "external data declared by half a name": (
        edit("config.json", lambda v: v["transformers.js_config"].update(
            use_external_data_format={"model": 1})), "use_external_data_format is"),
    "tokenizer class unknown to old transformers": (
        edit("tokenizer_config.json", lambda v: v.update(tokenizer_class="TokenizersBackend")),
        "tokenizer_class is 'TokenizersBackend', expected PreTrainedTokenizerFast"),
    "model_type unknown": (
        edit("config.json", lambda v: v.update(model_type="gptopt")), "model_type is 'gptopt'"),
}  # fmt: skip


@pytest.mark.parametrize(("mutate", "message"), MUTANTS.values(), ids=MUTANTS)
def test_a_wrong_folder_is_caught_before_its_graphs_are_played(
    mutate, message, original, tmp_path, monkeypatch
):
    monkeypatch.setattr("gptopt.export.verbs.prove", None)
    folder = tmp_path / "edge"
    shutil.copytree(original / "edge", folder)
    mutate(folder)
    write_manifest(folder, "edge")
    options = ValidateOptions(folder=str(folder), model=str(original / "model"), json=True)
    with pytest.raises(CheckFailed, match=message) as caught:
        validate(options)
    assert "\n" not in str(caught.value)


def test_the_right_folder_passes(original):
    options = ValidateOptions(
        folder=str(original / "edge"), model=str(original / "model"), json=True
    )
    assert validate(options)["passed"]


def test_the_exporters_own_folder_is_held_to_the_same(tmp_path, monkeypatch):
    write_configs = package.write_configs

    def wrong(folder, *given):
        write_configs(folder, *given)
        edit("config.json", lambda values: values.update(model_type="mine"))(folder)

    monkeypatch.setattr(package, "write_configs", wrong)
    with pytest.raises(CheckFailed, match="model_type is 'mine'"):
        package.export_model(random_gpt(block_size=16, vocab_size=64), None, tmp_path / "edge")
    assert list(tmp_path.iterdir()) == []
