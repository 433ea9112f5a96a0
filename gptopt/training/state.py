"""Everything beside weights and moments that a resumed run needs to continue bit for bit."""

import random
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptopt.config import MAX_SIZE, LoopOptions
from gptopt.errors import CheckFailed, first_line
from gptopt.manifest import read_json, write_json

STATE = "state.json"
RNG = "rng.safetensors"
_SHOWN = ("loss", "tokens_per_second", "mfu")  # of a line, where there may be no number yet
_NUMBERS = ("step", "lr", "eta_seconds")
Count = Annotated[int, Field(ge=0, lt=2**62)]


@dataclass
class Todo:
    """What remains to be done at a step once its weights are saved; itself part of the save."""

    line: dict[str, int | float | None] | None  # the step's line for metrics.jsonl
    evaluate: bool
    sample: bool


@dataclass
class TrainState:
    """Counters of a run. Losses are Python floats, so JSON keeps them exactly."""

    step: Count = 0  # optimiser steps taken, skipped ones included
    tokens: Count = 0  # tokens consumed
    seconds: float = 0.0  # of training, evaluation and saving, over all resumes
    skipped: Count = 0  # steps whose gradients were not finite
    loss_sum: float = 0.0  # over the steps since the last line of metrics.jsonl
    loss_count: Count = 0
    train_loss: float | None = None  # of the last line
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    warm_end: tuple[int, float] | None = None  # of the schedule
    stopped_by: str = ""  # "steps" | "time", empty while there is more to train
    budget_seconds: float | None = None  # the max_seconds that stopped it
    todo: Todo | None = None
    # Of a step, over all its micro-batches and ranks.
    sequences: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
    recent_losses: list[float] = field(default_factory=list)  # of single steps, for spikes
    sampler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    def is_finished(self, options: LoopOptions) -> bool:
        """Whether these options ask for no further step."""
        if not options.steps:  # what the epochs take: only the data tells
            return self.stopped_by == "steps"
        if self.step >= options.steps:
            return True
        budget, spent = options.max_seconds, self.budget_seconds
        return budget is not None and spent is not None and budget <= spent

    def go_on(self, options: LoopOptions) -> None:
        """Take up what was saved: these options may ask for more steps than the last ones."""
        if self.is_finished(options):
            self.stopped_by = self.stopped_by or "steps"
        else:
            self.stopped_by, self.budget_seconds = "", None

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """Read what `to_json` wrote.

        Raises:
            CheckFailed: fields are missing, unknown or of another kind (another version wrote it).
        """
        expected = {item.name for item in fields(cls)}
        if value.keys() != expected:
            odd = sorted(value.keys() ^ expected)
            raise CheckFailed(f"{STATE}: field {odd[0]!r} is missing or unknown")
        try:
            state = TypeAdapter(cls).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckFailed(f"{STATE}: field {where!r}: {first['msg']}") from None
        line = state.todo.line if state.todo else None
        if line is not None:
            numbers = [line.get(name) for name in _NUMBERS]
            if None in numbers or not line.keys() >= set(_SHOWN):
                raise CheckFailed(f"{STATE}: field 'todo.line' lacks numbers of its step")
        return state


def capture_state(
    state: TrainState, fixed: dict[str, Any], dropout: torch.Generator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The counters, the choices that may not change, and every random generator, of this moment."""
    numbers, tensors = _capture_random()
    tensors["dropout"] = dropout.get_state()
    return {"format": 1, "train": state.to_json(), "fixed": fixed, "random": numbers}, tensors


def write_state(folder: Path, captured: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    """Write what `capture_state` gave."""
    values, tensors = captured
    write_json(folder / STATE, values)
    save_file(tensors, folder / RNG)


def load_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """The counters and the choices that may not change, from a checkpoint."""
    content = read_json(folder / STATE)
    if content.get("format") != 1:
        raise CheckFailed(f"{folder / STATE}: expected format 1, found {content.get('format')!r}")
    train, fixed = content.get("train"), content.get("fixed")
    if not isinstance(train, dict) or not isinstance(fixed, dict):
        raise CheckFailed(f"{folder / STATE}: lacks train or fixed; resume from another checkpoint")
    state = TrainState.from_json(train)
    if folder.name != f"step-{state.step:06d}":
        raise CheckFailed(f"{folder / STATE}: is of step {state.step}; restore the folder")
    return state, fixed


def restore_random(folder: Path, dropout: torch.Generator) -> None:
    """Put every random generator back to where the checkpoint had it.

    Raises:
        ValueError: it had none, or other ones.
    """
    try:
        _restore_random(folder, dropout)
    except (ArithmeticError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{RNG}: {first_line(error)}") from None


def _restore_random(folder: Path, dropout: torch.Generator) -> None:
    numbers = read_json(folder / STATE)["random"]
    tensors = load_file(folder / RNG)
    version, state, gauss = numbers["python"]
    random.setstate((version, tuple(state), gauss))
    legacy = numbers["numpy"]
    key = np.array(legacy["key"], dtype=np.uint32)
    np.random.set_state(("MT19937", key, legacy["pos"], legacy["has_gauss"], legacy["gauss"]))
    torch.set_rng_state(tensors["torch"])
    dropout.set_state(tensors["dropout"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _capture_random() -> tuple[dict[str, Any], dict[str, Tensor]]:
    legacy: Any = np.random.get_state(legacy=False)
    numbers = {
        "python": random.getstate(),
        "numpy": {
            "key": legacy["state"]["key"].tolist(),
            "pos": legacy["state"]["pos"],
            "has_gauss": legacy["has_gauss"],
            "gauss": legacy["gauss"],
        },
    }
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    return numbers, tensors
