"""What judges clients, on clients that are made up; none needs to be installed."""

import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch

from gptopt.config import ModelConfig
from gptopt.errors import UserError
from gptopt.export.clients import CLIENTS, LIMITS, Client, check_clients, client_table, find_clients
from gptopt.export.clients.environments import FOLDER, PYTHON, browser, python_of
from gptopt.export.clients.limits import known_limit
from gptopt.export.clients.registry import RUNNERS, WEBGPU
from gptopt.export.folder import GraphFile, write_configs
from gptopt.export.package import Plan, export_model
from gptopt.export.targets import ORT_CPU, STANDARD
from gptopt.precisions import PRECISIONS
from gptopt.runtime.variants import EdgeFile
from gptopt.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

from random_models import random_gpt

TESTS = Path(__file__).parents[1]
CASES = ("greedy", "left padding", "right padding")
IN_BROWSERS = {"onnxruntime", "onnxruntime-web", "transformers.js-web", *WEBGPU}
# Where gptopt runs there is onnxruntime too, so one client needs no environment of its own.
HONEST = (RUNNERS / "onnxruntime_python.py").read_text(encoding="utf-8")
LIES = {
    "a token": ('.tolist(), first', '[:, ::-1].tolist(), first', "another token at 0 of row 0"),
    "a logit": ("first.astype", "(first + 1e-2).astype", "logit error 1.0"),
    "padding": ("position = (mask.cumsum(1) - 1)", "position = mask.cumsum(1)", "logit error"),
    "mask": ("mask[row, place]", "mask[row]", "logit error"),
    "too little": ("range(max(tokens, 1))", "range(tokens - 1)", "tokens in row 0, expected"),
    "a row": ("chosen, 1).tolist()", "chosen, 1).tolist()[:0]", "0 rows"),
    "nothing": ("Path(result_path)", 'Path("/dev/null")', "it wrote no result"),
    "crash": ("import numpy as np", "import nothing_of_that_name", "No module named"),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported folder, and its model."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], vocab_size=300)
    model = random_gpt(block_size=40, vocab_size=300, n_layer=1)
    folder = tmp_path_factory.mktemp("exported") / "folder"
    export_model(model, tokenizer, folder)
    return folder, model


@pytest.fixture(scope="module")
def masked(exported, tmp_path_factory):
    """The same of a masked language model."""
    model = random_gpt(block_size=40, vocab_size=300, n_layer=1, causal=False)
    folder = tmp_path_factory.mktemp("masked") / "folder"
    export_model(model, Tokenizer.load(exported[0]), folder)
    return folder, model


def made_up(source, folder):
    runner = folder / "runner.py"
    runner.write_text(source, encoding="utf-8")
    return Client(
        "made up", CASES, lambda asked, result, _: [sys.executable, str(runner), asked, result]
    )


def test_an_honest_client_passes(exported, tmp_path):
    said = check_clients(*exported, [made_up(HONEST, tmp_path)], tokens=8)
    assert [each.case for each in said] == list(CASES)
    assert all(each.passed and each.agreeing == each.tokens for each in said), client_table(said)
    assert said[0].tokens == 8
    assert said[0].version is not None
    assert "FAILED" not in client_table(said)


@pytest.mark.parametrize(("words", "lie", "reason"), LIES.values(), ids=LIES)
def test_a_client_that_says_something_else_fails(words, lie, reason, exported, tmp_path):
    assert words in HONEST
    client = made_up(HONEST.replace(words, lie), tmp_path)
    said = check_clients(*exported, [client], tokens=8)
    failed = [each for each in said if not each.passed]
    assert failed
    assert all(reason in each.error and each.limit is None for each in failed), client_table(said)
    assert "FAILED" in client_table(said)


def test_of_a_masked_language_model_every_position_is_judged(masked, tmp_path):
    (said,) = check_clients(*masked, [made_up(HONEST, tmp_path)])
    assert said.passed
    assert (said.case, said.tokens) == ("masked", 0)
    lie = 'out["logits"][row, : len(prompt)]'
    assert lie in HONEST
    client = made_up(HONEST.replace(lie, f"{lie}[::-1]"), tmp_path)
    (said,) = check_clients(*masked, [client])
    assert "logit error" in said.error


def test_a_file_that_rounds_is_given_the_largest_error_of_all_cases(exported, tmp_path):
    """Alone, the prompt of one case differs from PyTorch by what the draws of few roundings are."""
    folder = tmp_path / "q8"
    export_model(exported[1], Tokenizer.load(exported[0]), folder, plan=Plan([PRECISIONS["q8"]]))
    said = check_clients(folder, exported[1], [made_up(HONEST, tmp_path)], tokens=8)
    assert all(each.passed for each in said), client_table(said)
    assert max(each.budget for each in said) < 1.02 * min(each.budget for each in said)
    lie = made_up(HONEST.replace("first.astype", "(1.1 * first).astype"), tmp_path)
    assert not any(each.passed for each in check_clients(folder, exported[1], [lie], tokens=8))


def test_a_graph_that_chooses_tokens_itself_is_played_like_any_other(exported, tmp_path):
    folder = tmp_path / "greedy"
    export_model(exported[1], Tokenizer.load(exported[0]), folder, plan=Plan(tokens="greedy"))
    said = check_clients(folder, exported[1], [made_up(HONEST, tmp_path)], tokens=8)
    assert all(each.passed for each in said), client_table(said)


def test_a_model_that_labels_texts_is_none_for_clients(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "labels")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["gptopt"]["labels"] = ["good", "bad"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="labels texts, and clients are asked for tokens"):
        check_clients(folder, exported[1], [made_up(HONEST, tmp_path)])


def test_what_a_target_does_not_do_is_listed_and_no_failure(exported, tmp_path):
    folder = tmp_path / "ort-cpu"
    export_model(exported[1], Tokenizer.load(exported[0]), folder, target=ORT_CPU)
    said = check_clients(folder, exported[1], [made_up(HONEST, tmp_path)], tokens=8)
    assert [each.limit and each.limit.name for each in said] == [None, "right padding only", None]
    assert "known limit: a file of --target ort-cpu" in client_table(said)
    assert "FAILED" not in client_table(said)


def test_a_static_cache_is_as_long_as_the_text_will_be(exported, tmp_path):
    folder = tmp_path / "standard"
    export_model(exported[1], Tokenizer.load(exported[0]), folder, target=STANDARD)
    said = check_clients(folder, exported[1], [made_up(HONEST, tmp_path)], tokens=8)
    assert all(each.passed for each in said), client_table(said)


def test_an_unknown_client_is_named():
    with pytest.raises(UserError, match=r"found 'browser', expected all, or some of onnxruntime,"):
        find_clients("genai,browser")
    with pytest.raises(UserError, match="found nothing"):
        find_clients(" ,")
    assert [each.name for each in find_clients("openvino, genai,openvino")] == ["openvino", "genai"]


def test_all_has_the_cpp_client_where_headers_are_named(monkeypatch):
    monkeypatch.delenv("ORT_INCLUDE", raising=False)
    installable = [each.name for each in find_clients("all")]
    assert len(installable) == 8
    monkeypatch.setenv("ORT_INCLUDE", "/nowhere")
    assert [each.name for each in find_clients("all")] == [*installable, "onnxruntime-cpp"]
    with pytest.raises(UserError, match=r"onnxruntime-cpp: no onnxruntime_cxx_api.h in ORT_INC"):
        CLIENTS["onnxruntime-cpp"].command(Path(), Path(), Path())


@pytest.mark.parametrize("client", PYTHON)
def test_a_client_that_is_not_installed_is_named(client, exported, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "empty"))
    with pytest.raises(UserError, match=rf"^{client}: not installed .*make clients"):
        python_of(client)
    with pytest.raises(UserError, match=rf"^{client}: not installed"):
        check_clients(*exported, [CLIENTS[client]])


def test_a_missing_browser_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CHROMIUM", "")
    with pytest.raises(UserError, match=r"^chromium: not found .*apt-get install chromium"):
        browser()


def test_a_limit_is_known_by_its_words_client_and_case():
    limit = LIMITS[0]
    words = " and ".join(limit.evidence)
    assert known_limit(limit.client, limit.cases[0], words) is limit
    assert known_limit("genai", limit.cases[0], words) is None
    assert known_limit(limit.client, "greedy", words) is None
    assert known_limit(limit.client, limit.cases[0], limit.evidence[0]) is None


def test_the_matrix_names_every_option_client_and_case():
    rows = tomllib.loads((TESTS / "clients_matrix.toml").read_text(encoding="utf-8"))
    configs = [row["config"] for row in rows.values()]
    for name in ("position", "norm", "norm_position", "activation"):
        field = ModelConfig.model_fields[name]
        assert {config.get(name, field.default) for config in configs} == set(
            get_args(field.annotation)
        )
    for name in ("window", "attn_softcap", "logit_softcap", "qk_norm", "tie_head", "bias",
                 "n_kv_head", "head_dim", "rotary_interleaved"):  # fmt: skip
        assert any(name in config for config in configs), name
    assert {config.get("causal", True) for config in configs} == {True, False}
    known = {"pass", *(limit.name for limit in LIMITS)}
    for row in rows.values():
        web = row.get("target") == "web"
        named = IN_BROWSERS if web else CLIENTS.keys() - WEBGPU
        assert row.keys() & CLIENTS.keys() == named
        for client in (CLIENTS[name] for name in named):
            causal = row["config"].get("causal", True)
            assert set(row[client.name]) == set(client.cases if causal else ["masked"])
            assert set(row[client.name].values()) <= known


def test_a_head_of_its_own_width_is_told_where_clients_look_for_it(tmp_path):
    for name, width, kind in (("plain", None, "gpt2"), ("wide", 10, "gemma")):
        config = ModelConfig(
            n_layer=1, n_head=4, n_embd=32, block_size=8, vocab_size=9, head_dim=width
        )
        (tmp_path / name).mkdir()
        write_configs(
            tmp_path / name, config, None, "portable", [GraphFile("fp32", EdgeFile(), False)]
        )
        told = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert told["model_type"] == kind
        assert width in (None, told.get("head_dim"))
