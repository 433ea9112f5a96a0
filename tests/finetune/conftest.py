"""Models so small, and examples so few, that a test can afford several runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptopt.checkpoint import save_model
from gptopt.config import ModelConfig
from gptopt.config_finetune import ClassifyOptions, SftOptions
from gptopt.model import GPT
from gptopt.tokenizer import Tokenizer

ANIMALS = ("cat", "dog", "cow", "owl", "hen", "fox")
SOUNDS = ("meows", "barks", "moos", "hoots", "clucks", "yelps")
TEXT = " ".join(f"what says the {a}? the {a} {s}." for a, s in zip(ANIMALS, SOUNDS, strict=True))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Half of a tiny run would be the matmul probe and the picture."""
    monkeypatch.setattr("gptopt.training.run.matmul_peak", lambda device, dtype: None)
    monkeypatch.setattr("gptopt.training.run.draw_loss", lambda *arguments: False)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory) -> Callable[..., Path]:
    """make_base(**model): a folder of a random model that spells TEXT."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("base")
            tokenizer = Tokenizer.train([TEXT] * 3, vocab_size=300, mask_token=True)
            shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 320}
            torch.manual_seed(1)
            save_model(folder, GPT(ModelConfig(**(shape | changes))), tokenizer)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """write(*records): a jsonl of them; text stands for itself."""

    def make(*records: Any, name: str = "data.jsonl") -> str:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return make


@pytest.fixture
def replies(write) -> str:
    """Prompts and completions of several lengths."""
    pairs = zip(ANIMALS, SOUNDS, strict=True)
    return write(
        *({"prompt": f"what says the {a}? ", "completion": f"the {a} {s}."} for a, s in pairs),
        *({"prompt": f"{a}? ", "completion": s} for a, s in zip(ANIMALS, SOUNDS, strict=True)),
    )


def _options(kind: type, make_base, tmp_path) -> Callable[..., Any]:
    def make(inputs: str, out: str = "run", **changes: Any) -> Any:
        values = {
            "inputs": [inputs], "out": str(tmp_path / out), "steps": 6, "batch_size": 2,
            "warmup_steps": 2, "eval_every": 0, "checkpoint_every": 2, "log_every": 1, "seed": 5,
            "device": "cpu", "json": True, "lr": 1e-3,
        }  # fmt: skip
        values["init_from"] = str(changes.pop("init_from", None) or make_base())
        return kind.model_validate(values | changes)

    return make


@pytest.fixture
def sft_options(make_base, tmp_path) -> Callable[..., SftOptions]:
    """Options of a tiny run of sft; keywords change them."""
    return _options(SftOptions, make_base, tmp_path)


@pytest.fixture
def classify_options(make_base, tmp_path) -> Callable[..., ClassifyOptions]:
    """Options of a tiny run of classify; keywords change them."""
    return _options(ClassifyOptions, make_base, tmp_path)
