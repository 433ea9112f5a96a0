"""What a resumed run may not change, and the line that says so."""

from typing import Any

from gptopt.config import ModelConfig, TrainOptions
from gptopt.errors import UserError

# A run is its seed, its batches and its update rule. How long it goes on, what it shows and where
# it runs may change (another device or another kernel body no longer repeats every bit).
_FIXED = (
    "seed", "batch_size", "accumulate", "lr", "min_lr", "warmup_steps", "schedule", "weight_decay",
    "beta1", "beta2", "grad_clip", "label_smoothing", "z_loss", "init_from",
)  # fmt: skip


def fixed_choices(
    options: TrainOptions, model: ModelConfig, dtype: str, data_sha256: str, tokenizer_sha256: str
) -> dict[str, Any]:
    """The choices that stay for the life of a run, as JSON."""
    choices = _choices_of(options) | _of_model(model.model_dump())
    return choices | {"dtype": dtype, "data": data_sha256, "tokenizer": tokenizer_sha256}


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


def refuse_changed_options(options: TrainOptions, saved: dict[str, Any]) -> None:
    """The part of `refuse_changes` that needs neither the text nor a model."""
    explicit = {name: getattr(options.model, name) for name in options.model.model_fields_set}
    refuse_changes(options.out, saved, _choices_of(options) | _of_model(explicit))


def _choices_of(options: TrainOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _FIXED}


def _of_model(values: dict[str, Any]) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in values.items()}


def _short(value: Any) -> str:
    text = str(value)
    return f"sha256 {text[:12]}" if len(text) == 64 else text
