"""What an adapter is for: a model of documentation learns to read source code, in numbers.

The texts are those that every CPython carries: its documentation for the base, its own source for
the adapter, a part of it held out.
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import pytest

from gptopt.config import EvaluateOptions, TrainOptions
from gptopt.evaluate import evaluate
from gptopt.training import train

MARGIN = 0.5  # nats per token on source code that neither has seen
SOURCES = ("argparse", "ast", "calendar", "configparser", "csv", "difflib", "doctest", "tarfile")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    topics = pydoc_data.topics.topics
    (folder / "docs.txt").write_text("\n\n".join(topics[name] for name in sorted(topics))[:250_000])
    library = Path(argparse.__file__).parent
    code = "\n\n".join((library / f"{name}.py").read_text("utf-8") for name in SOURCES)
    (folder / "code.txt").write_text(code[:250_000])
    return folder


def run(folder, out, text, **options):
    shared = {
        "inputs": [str(folder / text)], "out": str(folder / out), "device": "cpu", "json": True,
        "eval_every": 0, "eval_batches": 0, "checkpoint_every": 0, "warmup_steps": 10,
        "batch_size": 8, "log_every": 50, "min_lr": 0.0,
    }  # fmt: skip
    return train(TrainOptions.model_validate(shared | options))


@pytest.fixture(scope="module")
def base(texts):
    return run(
        texts, "base", "docs.txt", steps=300, lr=1e-2, data={"vocab_size": 512},
        model={
            "n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64, "position": "rotary",
            "norm": "rmsnorm",
        },
    )  # fmt: skip


def gain(texts, base, seed, **lora):
    """Losses on held-out code, of the base and of the base with an adapter trained on code."""
    adapted = run(
        texts, f"code-{seed}", "code.txt", init_from=base["out"], steps=150, lr=2e-2, seed=seed,
        lora={"rank": 8, "targets": "attention,ffn", **lora},
    )  # fmt: skip
    held_out = str(Path(adapted["out"]) / "data")  # as it was split, with the base's tokenizer
    scored = [
        evaluate(
            EvaluateOptions(model=model, adapter=adapter, data=[held_out], split="val", json=True)
        )["val_loss"]
        for model, adapter in ((base["out"], None), (base["out"], adapted["out"]))
    ]
    assert scored[1] == pytest.approx(adapted["val_loss"], abs=1e-5)
    return scored


def test_an_adapter_teaches_a_model_of_prose_to_read_code(texts, base):
    weights = Path(base["checkpoint"]) / "model.safetensors"
    content = weights.read_bytes()
    before, after = gain(texts, base, seed=0)
    assert before - after >= MARGIN
    assert weights.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_seed_gains_as_much(texts, base, seed):
    before, after = gain(texts, base, seed)
    assert before - after >= MARGIN
