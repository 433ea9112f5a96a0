"""`gptopt evaluate`: every target once, the same in torch and in onnxruntime, by the definition."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptopt.config import DataOptions, EvaluateOptions, TokenizeOptions
from gptopt.data import open_dataset, tokenize
from gptopt.errors import CheckFailed, UserError
from gptopt.evaluate import evaluate, evaluate_split, windows
from gptopt.tokenizer import Tokenizer

TEXT = "The lazy fox naps. \N{FOX FACE} The quick dog jumps over the caf\u00e9.\n" * 9


class Split:
    """Tokens in memory, with the interface of a TokenSplit, that notes which targets it gave."""

    name = "val"

    def __init__(self, ids):
        self.ids, self.given = np.asarray(ids), []

    def __len__(self):
        return len(self.ids)

    def batch(self, offsets, block_size):
        for offset in offsets:
            self.given += range(offset + 1, offset + block_size + 1)
        return np.stack([self.ids[offset : offset + block_size + 1] for offset in offsets])


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def by_definition(model, ids):
    """Mean of -ln p over windows of 16, in float64."""
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor(ids[start : start + 17])[None]
        with torch.no_grad():
            logits = model(window[:, :-1]).logits.double()
        total += float(F.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    return total / (len(ids) - 1)


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_target_is_counted_once(model, n, batch_size):
    split = Split(np.random.default_rng(n).integers(0, 300, n))
    loss, tokens = evaluate_split(model, split, block_size=16, batch_size=batch_size)
    assert sorted(split.given) == list(range(1, n))
    assert tokens == n - 1
    assert loss == pytest.approx(by_definition(model, split.ids.tolist()), rel=1e-6)


def test_a_part_is_spread_over_the_split_and_always_the_same(model):
    split = Split(np.random.default_rng(0).integers(0, 300, 1000))
    results = [
        evaluate_split(model, split, block_size=16, batch_size=2, max_batches=3) for _ in "ab"
    ]
    assert results[0] == results[1]
    assert results[0][1] == 6 * 16
    assert len(set(split.given)) == 6 * 16
    assert max(split.given) > 800
    whole = evaluate_split(model, split, block_size=16, batch_size=2, max_batches=99)
    assert whole[1] == 999


def test_windows_keep_to_the_batch_size():
    found = [(offsets.tolist(), T) for offsets, T in windows(24, 4, 2)]
    assert found == [([0, 4], 4), ([8, 12], 4), ([16], 4), ([20], 3)]


def test_the_model_is_left_as_it_was(make_model):
    model = make_model(dropout=0.5).train()
    split = Split(range(60))
    first = evaluate_split(model, split, block_size=16, batch_size=2)
    assert first == evaluate_split(model, split, block_size=16, batch_size=2)  # no dropout
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("n", [0, 1])
def test_a_split_without_a_target_is_refused(model, n):
    with pytest.raises(UserError, match=f"the val split holds {n} tokens, at least 2 are needed"):
        evaluate_split(model, Split(range(n)), block_size=16, batch_size=2)


def test_torch_and_edge_agree_on_raw_text(model, model_folder, edge_folder, tokenizer, text):
    in_torch = evaluate(EvaluateOptions(model=str(model_folder), data=[str(text)], json=True))
    on_edge = evaluate(EvaluateOptions(model=str(edge_folder), data=[str(text)], json=True))
    ids = tokenizer.encode(TEXT)
    assert in_torch["tokens"] == on_edge["tokens"]
    assert in_torch["tokens"] - (len(ids) - 1) in (0, 1)  # an end-of-text token may close it
    assert on_edge["val_loss"] == pytest.approx(in_torch["val_loss"], rel=1e-6)
    assert in_torch["perplexity"] == pytest.approx(math.exp(in_torch["val_loss"]))
    assert (in_torch["device"], on_edge["provider"]) == ("cpu", "cpu")
    assert set(in_torch) ^ set(on_edge) == {"device", "provider"}
    size = len(TEXT.encode()) - len(tokenizer.decode(ids[:1]).encode())
    nats = in_torch["val_loss"] * in_torch["tokens"]
    assert in_torch["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


def test_batches_too_large_for_memory_are_cut(edge_folder, text, monkeypatch):
    options = EvaluateOptions(model=str(edge_folder), data=[str(text)], json=True)
    whole = evaluate(options)
    monkeypatch.setattr("gptopt.evaluate._LOGITS_AT_ONCE", 16 * 320 * 2)
    monkeypatch.setattr("gptopt.evaluate._POSITIONS_AT_ONCE", 5)
    assert evaluate(options)["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-9)


@pytest.fixture
def data_folder(tokenizer, text, tmp_path):
    tokenizer.save(tmp_path / "tok")
    tokenize(
        TokenizeOptions(
            inputs=[str(text)], out=str(tmp_path / "data"), tokenizer=str(tmp_path / "tok"),
            val_fraction=0.3,
        )
    )  # fmt: skip
    return tmp_path / "data"


def test_a_data_folder_is_scored_on_its_validation_split(model, model_folder, data_folder, capsys):
    dataset = open_dataset([str(data_folder)], DataOptions())
    for split, name in ((dataset.val, "auto"), (dataset.val, "val"), (dataset.train, "train")):
        options = {"model": str(model_folder), "data": [str(data_folder)], "split": name}
        result = evaluate(EvaluateOptions(**options))
        expected = by_definition(model, split.read(0, len(split)).tolist())
        assert result["val_loss"] == pytest.approx(expected, rel=1e-6)
        assert (result["tokens"], result["split"]) == (len(split) - 1, split.name)
    assert f"train: loss {result['val_loss']:.4f}, perplexity " in capsys.readouterr().out
    some = evaluate(EvaluateOptions(**options, max_tokens=20, json=True))
    ids = dataset.train.read(0, 21).tolist()
    assert some["val_loss"] == pytest.approx(by_definition(model, ids), rel=1e-6)
    assert some["tokens"] == 20


def test_another_tokenizers_data_is_refused(model_folder, edge_folder, text, tmp_path):
    other = Tokenizer.train(["quite another text"], kind="bpe", vocab_size=280)
    other.save(tmp_path / "other")
    tokenize(
        TokenizeOptions(
            inputs=[str(text)], out=str(tmp_path / "data"), tokenizer=str(tmp_path / "other")
        )
    )
    for model in (model_folder, edge_folder):
        with pytest.raises(UserError, match=other.sha256[:12]):
            evaluate(EvaluateOptions(model=str(model), data=[str(tmp_path / "data")]))


def test_what_an_exported_folder_has_not_is_refused(edge_folder, text):
    for more in ({"kernels": "reference"}, {"checkpoint": "best"}):
        with pytest.raises(UserError, match="knows no --kernels and no --checkpoint"):
            evaluate(EvaluateOptions(model=str(edge_folder), data=[str(text)], **more))
    with pytest.raises(UserError, match="available here: cpu"):
        evaluate(EvaluateOptions(model=str(edge_folder), data=[str(text)], device="cuda"))


def test_a_masked_model_has_no_such_loss(make_model, tokenizer, text, tmp_path):
    from gptopt.checkpoint import save_model

    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", make_model(causal=False), tokenizer)
    with pytest.raises(UserError, match="masked language model"):
        evaluate(EvaluateOptions(model=str(tmp_path / "model"), data=[str(text)]))


def test_a_loss_that_is_no_number_fails_the_check(model, tokenizer, text, monkeypatch):
    broken = torch.nn.Module()
    broken.weight = torch.nn.Parameter(torch.zeros(1))
    broken.config = model.config
    broken.forward = lambda ids, targets: SimpleNamespace(loss=torch.tensor(float("nan")))
    monkeypatch.setattr(
        "gptopt.checkpoint.load_model",
        lambda *args, **kwargs: SimpleNamespace(model=broken, tokenizer=tokenizer, folder=None),
    )
    with pytest.raises(CheckFailed, match="the loss is nan"):
        evaluate(EvaluateOptions(model="broken", data=[str(text)]))


def test_an_exported_folder_is_evaluated_without_torch(gptopt, edge_folder, text, tmp_path):
    code = (
        "import sys\nfrom gptopt.cli import main\n"
        f"code = main(['evaluate', {str(edge_folder)!r}, '--data', {str(text)!r}, '--json'])\n"
        "assert code == 0 and 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert {"val_loss", "perplexity", "tokens"} <= set(json.loads(done.stdout))
