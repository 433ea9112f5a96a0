"""The bench of --qat: a row for each way to a file, and what is written names no folder."""

import json

import numpy as np
import pytest
import torch

from gptopt.bench import qat
from gptopt.checkpoint import save_model
from gptopt.config import ModelConfig, TokenizeOptions
from gptopt.data import tokenize
from gptopt.model import GPT
from gptopt.tokenizer import Tokenizer


@pytest.mark.slow
def test_every_file_is_measured_beside_the_plain_steps(tmp_path, monkeypatch):
    words = [f"{first}{second}" for first in "bdfgklmn" for second in "aeiou"]
    random = np.random.default_rng(1)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.choice(words, 3000)))
    data = str(tmp_path / "data")
    tokenize(TokenizeOptions(inputs=[str(text)], out=data, vocab_size=280, json=True))
    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=320)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", GPT(config, kernels="reference"), Tokenizer.load(data))
    out = tmp_path / "qat.json"
    words_given = [
        "qat", str(tmp_path / "model"), data, "--held-out", str(text), "--calibration", str(text),
        "--precision", "q2", "--steps", "3", "--out", str(out),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", words_given)
    qat.main()
    written = json.loads(out.read_text())
    ways = [(row["qat"], row["calibrated"]) for row in written["rows"]]
    assert ways == [(False, False), (False, True), (True, False), (True, True)]
    assert len({row["model_perplexity"] for row in written["rows"]}) == 1
    assert written["command"].startswith("python -P -m gptopt.bench.qat model data ")
    assert str(tmp_path) not in out.read_text()
    aware = [row["perplexity"] for row in written["rows"] if row["qat"]]
    assert aware[1] == pytest.approx(aware[0], rel=1e-3)  # both exports find its weights again
