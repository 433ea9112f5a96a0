"""The bench of quantised files: rows of every preset, llama.cpp's weights under our names."""

import importlib
import json

import numpy as np
import pytest
import torch

from gptopt.bench.peers import gguf_weights, llamacpp
from gptopt.bench.quality import quality
from gptopt.checkpoint import save_model
from gptopt.config import ModelConfig
from gptopt.config_machine import QualityOptions
from gptopt.errors import UserError
from gptopt.model import GPT
from gptopt.precisions import Allowed
from gptopt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("quality")
    words = [f"{first}{second}" for first in "bdfgklmn" for second in "aeiou"]
    random = np.random.default_rng(1)
    for name in ("text", "other"):
        (root / name).write_text(" ".join(random.choice(words, 1200)))
    tokenizer = Tokenizer.train([(root / "text").read_text()], kind="bpe", vocab_size=280)
    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=320)
    (root / "model").mkdir()
    save_model(root / "model", GPT(config, kernels="reference").eval(), tokenizer)
    return root


def test_a_row_for_every_file(root, tmp_path, monkeypatch, caplog):
    package = importlib.import_module("gptopt.export.package")
    monkeypatch.setattr(package, "allowed_of", lambda *_: Allowed())
    options = QualityOptions(
        models=[str(root / "model")], held_out=str(root / "other"),
        calibration=str(root / "text"), precision="q4,q4-fast", budget=["bytes=1MB"],
        out=str(tmp_path), json=True,
    )  # fmt: skip
    found = quality(options)
    names = [row["contender"] for row in found["rows"]]
    assert names == ["gptopt q4", "gptopt q4-fast", "gptopt q4 bytes=1MB"]
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["rows"] == json.loads(json.dumps(found["rows"]))
    assert "processor" in written["machine"]
    assert found["rows"][2]["mean_kl"] < found["rows"][0]["mean_kl"]  # 8 bits everywhere
    assert "gptopt q4" not in (tmp_path / "quality.svg").read_text()[:100]
    assert "llama.cpp takes no part" in caplog.text


def test_another_environment_is_one_line(root, tmp_path):
    options = QualityOptions(
        models=[str(root / "model")], held_out=str(root / "other"),
        calibration=str(root / "text"), peer_python="llamacpp=/none", out=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(UserError, match="expected llamacpp=PYTHON, the Python of an environment"):
        quality(options)


def test_names_of_llama_cpp_find_back():
    ours = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
    for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        ours |= {f"h.{layer}.{part}.{kind}" for layer in range(2) for kind in ("weight", "bias")}
    weights = {name: np.full((2, 3), index) for index, name in enumerate(sorted(ours))}
    for theirs, array in llamacpp._renamed(weights, 2):
        name, transposed = gguf_weights._ours(theirs)
        assert np.array_equal(array.T if transposed else array, weights.pop(name))
    assert weights == {}
