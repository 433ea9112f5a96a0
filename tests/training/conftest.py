"""Runs small enough that a test can afford several of them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rank import Ranks

from gptopt.config import TrainOptions

SENTENCES = (
    "the cat sat on the mat and looked at the dog. ",
    "a dog ran to the red door; the cat did not care! ",
    "who knows what the old dog saw behind that door? ",
)


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Half of a tiny run would be the matmul probe and the picture; `in_full` asks for both."""
    if "in_full" in request.fixturenames:
        return
    monkeypatch.setattr("gptopt.training.run.matmul_peak", lambda device, dtype: None)
    monkeypatch.setattr("gptopt.training.run.draw_loss", lambda *arguments: False)


@pytest.fixture
def in_full() -> None:
    """Nothing of the run is left out."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A few thousand characters of text that a tiny model can learn something from."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(SENTENCES[i * i % 3] for i in range(60)))
    return path


@pytest.fixture
def options(corpus, tmp_path) -> Callable[..., TrainOptions]:
    """Options of a tiny run; keywords change them, model=... merges into the tiny model."""

    def make(out: str | Path = "run", **changes: Any) -> TrainOptions:
        model = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}
        model |= changes.pop("model", {})
        values = {
            "inputs": [str(corpus)],
            "out": str(tmp_path / out),
            "steps": 6,
            "batch_size": 3,
            "warmup_steps": 2,
            "eval_every": 0,
            "eval_batches": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "seed": 5,
            "device": "cpu",
            "json": True,
            "model": model,
            "data": {"kind": "char"},
        }
        return TrainOptions.model_validate(values | changes)

    return make


@pytest.fixture
def flags(options) -> Callable[..., list[str]]:
    """The same run as arguments of `gptopt train`."""

    def make(out: str | Path = "run", **changes: Any) -> list[str]:
        dumped = options(out, **changes).model_dump(exclude={"json_output"})
        arguments = list(dumped.pop("inputs"))
        for group in [key for key, value in dumped.items() if isinstance(value, dict)]:
            dumped |= {f"{group}.{key}": value for key, value in dumped.pop(group).items()}
        for key, value in dumped.items():
            flag = "--" + key.replace("_", "-")
            if value is True:
                arguments.append(flag)
            elif isinstance(value, list):
                arguments += [word for each in value for word in (flag, str(each))]
            elif value is not None and value is not False:
                arguments += [flag, str(value)]
        return arguments

    return make


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes that train together what they are told, time and again."""
    two = Ranks(2)
    yield two
    two.close()
