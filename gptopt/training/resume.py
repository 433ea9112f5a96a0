"""What a resumed run may not change, and the line that says so."""

from typing import Any

from gptopt.config import ModelConfig, Options
from gptopt.errors import UserError
from gptopt.training.objective import Objective


def fixed_choices(objective: Objective, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The choices that stay for the life of a run, as JSON."""
    choices = _choices_of(objective) | _of_model(model.model_dump(mode="json"))
    identities = {"data": objective.sha256, "tokenizer": objective.tokenizer.sha256}
    return choices | {"dtype": dtype} | identities


def refuse_changes(out: str, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Compare a checkpoint's choices with this command's.

    Raises:
        UserError: one differs; the line names it with its old and its new value.
    """
    for name, new in asked.items():
        old = saved.get(name)
        if old != new:
            raise UserError(
                f"{out}: cannot resume with another {name}: the run has {_short(old)}, this"
                f" command says {_short(new)}; use the run's value, or train into another --out"
            )


def refuse_changed_options(objective: Objective, saved: dict[str, Any]) -> None:
    """The part of `refuse_changes` that needs neither the data nor a model."""
    asked = _choices_of(objective) | _of_model(objective.explicit_shape())
    refuse_changes(objective.options.out, saved, asked)


def _choices_of(objective: Objective) -> dict[str, Any]:
    options = objective.options
    choices: dict[str, Any] = {}
    for name in (*objective.FIXED, "lora"):
        value = getattr(options, name)
        if isinstance(value, Options):
            choices |= {f"{name}.{key}": each for key, each in value.model_dump().items()}
        else:
            choices[name] = value
    return choices


def _of_model(values: dict[str, Any]) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in values.items()}


def _short(value: Any) -> str:
    text = str(value)
    return f"sha256 {text[:12]}" if len(text) == 64 else text
