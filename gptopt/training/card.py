"""README.md of a run and of the checkpoints that it stands for, every number the run's own."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptopt import __version__
from gptopt.card import CARD, HERE, cell, code, model_card, short, table, task_of
from gptopt.hub import PREFIX
from gptopt.manifest import write_text
from gptopt.training.checkpoints import step_of
from gptopt.training.hardware import device_name, dtype_name
from gptopt.training.metrics import METRICS, Line, read_metrics
from gptopt.training.objective import Told
from gptopt.training.session import Session

# Figure of an evaluation -> its column, and what the Hub calls it.
_FIGURES = {
    "val_loss": ("loss", "loss"),
    "perplexity": ("perplexity", "perplexity"),
    "bits_per_byte": ("bits per byte", "bits_per_byte"),
    "val_accuracy": ("accuracy", "accuracy"),
    "val_f1": ("F1", "f1"),
}


def write_cards(session: Session, result: Mapping[str, Any], told: Told) -> None:
    """Say in the best checkpoint, in the last one and in the run folder what the run found.

    Args:
        session: a run that has ended.
        result: its figures.
        told: what its objective says of the data.
    """
    out, checkpoints = session.out, session.checkpoints
    lines = {line["step"]: line for line in read_metrics(out / METRICS) if "val_loss" in line}
    standing = [checkpoints.pointed(name) for name in ("best", "latest")]
    folders = list(dict.fromkeys(folder for folder in standing if folder and folder.is_dir()))
    for folder in folders:
        write_text(folder / CARD, _card(session, result, told, lines, folder, HERE))
    if folders:
        inside = folders[0].relative_to(out).as_posix()
        text = _card(session, result, told, lines, folders[0], f"{HERE}/{inside}")
        if result["loss_curve"]:
            text += f"\n![loss while training]({Path(result['loss_curve']).name})\n"
        write_text(out / CARD, text)


def _card(
    session: Session,
    result: Mapping[str, Any],
    told: Told,
    lines: Mapping[int, Line],
    folder: Path,
    here: str,
) -> str:
    step, name = step_of(folder), session.out.resolve().name
    measured = {at: _figures(lines[at], told) for at in lines}
    sections = [
        "## How good it is\n\n" + _quality(result, told, measured, step, here),
        "## How it was made\n\n" + _history(session, result, told, step),
        "## Limits\n\n" + _limits(session, told),
    ]
    front: dict[str, Any] = {"license": "unknown"}
    start = session.options.init_from or ""
    if start.startswith(PREFIX):
        front["base_model"] = start.removeprefix(PREFIX).partition("@")[0]
    if step in measured:
        front["model-index"] = [_index(session, name, told, measured[step])]
    model, tokenizer = session.model, session.objective.tokenizer
    return model_card(model, tokenizer, "\n\n".join(sections), name=name, front=front, folder=here)


def _figures(line: Line, told: Told) -> dict[str, float]:
    """What an evaluation found, with what follows from its loss."""
    figures = {name: line[name] for name in _FIGURES if name in line}
    if told.predicts_next:
        loss = figures["val_loss"]
        if loss < 700:
            figures["perplexity"] = math.exp(loss)
        if (bits := told.bits_per_byte(loss)) is not None:
            figures["bits_per_byte"] = bits
    return figures


def _index(session: Session, name: str, told: Told, figures: Mapping[str, float]) -> dict[str, Any]:
    """An entry of the Hub's model-index."""
    metrics = [
        {"type": _FIGURES[key][1], "value": value, "name": f"{_FIGURES[key][0]}, {told.held_out}"}
        for key, value in figures.items()
    ]
    task, data = task_of(session.model.config), next(iter(told.data.values()))
    dataset = {"type": "text", "name": data.replace("`", "")}
    results = [{"task": {"type": task}, "dataset": dataset, "metrics": metrics}]
    return {"name": name, "results": results}


def _quality(
    result: Mapping[str, Any],
    told: Told,
    measured: Mapping[int, Mapping[str, float]],
    step: int,
    here: str,
) -> str:
    if not measured:
        return (
            f"Nothing was held out, so nothing was measured but the loss in training: "
            f"{_number(result['train_loss'])} nats per {told.loss_of} in the last steps."
        )
    end = max(measured)
    best = result["best_step"]
    names = {best: "the best", end: "the last"}
    names[step] = "**this model**" + (", the best" if step == best else "")
    shown = [name for name in _FIGURES if name in measured[end]]
    head = [" ", "step", *(_FIGURES[name][0] for name in shown)]
    rows = [
        f"| {names[at]} | {at:,} | "
        + " | ".join(_number(measured[at].get(name)) for name in shown) + " |"
        for at in sorted(names) if at in measured
    ]  # fmt: skip
    chosen = ""
    if len(measured) > 1:
        chosen = (
            f" Of {len(measured)} evaluations the best one chose the checkpoint that the run stands"
            f" for, so text that had no part in that scores a little worse."
        )
    parts = [
        f"On {told.held_out}; the loss is in nats per {told.loss_of}.{chosen}",
        f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n" + "\n".join(rows),
    ]
    if result.get("val_scores") and step == best:
        parts.append(_by_label(result["val_scores"]))
    parts.append(told.measure.replace(HERE, here))
    return "\n\n".join(parts)


def _by_label(scores: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        f"| {cell(code(label))} | {_number(each['precision'])} | {_number(each['recall'])} | "
        f"{_number(each['f1'])} | {each['count']:,} |"
        for label, each in scores.items()
    ]
    return "| label | precision | recall | F1 | texts |\n|---|---|---|---|---|\n" + "\n".join(rows)


def _history(session: Session, result: Mapping[str, Any], told: Told, step: int) -> str:
    options, tokenizer = session.options, session.objective.tokenizer
    start = "random weights" if options.init_from is None else code(short(options.init_from))
    if options.init_from is not None and options.lora.rank:
        start += ", whose weights stayed as they are"
    rows = {
        "learned": told.learns,
        "began with": start,
        **told.data,
        "tokenizer": f"{tokenizer.size:,} ids, sha256 `{tokenizer.sha256}`",
        "steps": f"{result['steps']:,}, of {session.state.sequences:,} sequences each; this model "
                 f"is that of step {step:,}",
        "tokens": f"{result['tokens']:,} read",
        "time": f"{result['seconds']:,.1f} s with evaluation and saving{_speed(result)}",
        "hardware": f"{session.world.size} x {device_name(session.device)} "
                    f"({session.device.type}, {dtype_name(session.dtype)})",
        "software": f"gptopt {__version__}, torch {torch.__version__}",
        "update rule": _rule(session),
        "also": _also(session),
        "last training loss": _number(result["train_loss"]),
    }  # fmt: skip
    if result["skipped"]:
        rows["skipped"] = f"{result['skipped']:,} steps, whose gradients were not finite"
    again = (
        f"The run folder's config.toml holds every option; on the same data and machine `gptopt "
        f"{told.verb} --config config.toml --out AGAIN` repeats the run."
    )
    return f"{table({name: value for name, value in rows.items() if value})}\n\n{again}"


def _speed(result: Mapping[str, Any]) -> str:
    rate = result["tokens_per_second"]
    return "" if rate is None else f"; {rate:,.0f} tokens/s while training"


def _rule(session: Session) -> str:
    options = session.options
    name = {"adamw": "AdamW", "muon": "Muon (AdamW for what is no matrix of a block)"}
    clipped = f", gradients clipped at {options.grad_clip:g}" if options.grad_clip else ""
    return (
        f"{name[options.optimiser]}, learning rate {options.lr:g} to {options.min_lr:g} "
        f"({options.schedule}, {options.warmup_steps:,} steps of warm-up), betas {options.beta1:g} "
        f"and {options.beta2:g}, weight decay {options.weight_decay:g}{clipped}"
    )


def _also(session: Session) -> str:
    """Options that are left out of a card where they do nothing."""
    options = session.options
    given = {
        "dropout": session.model.config.dropout,
        "LoRA dropout": options.lora.dropout if options.lora.rank else 0.0,
        "label smoothing": options.label_smoothing,
        "z-loss": getattr(options, "z_loss", 0.0),
        "weights rounded as the export to": options.qat,
    }
    return ", ".join(f"{name} {value}" for name, value in given.items() if value) + (
        f"{', ' if any(given.values()) else ''}seed {options.seed}"
    )


def _limits(session: Session, told: Told) -> str:
    config, tokenizer = session.model.config, session.objective.tokenizer
    lines = [
        f"It sees {config.block_size:,} tokens at most.",
        "It knows what the data above say"
        + (", and what the model that it began with knew" if session.options.init_from else "")
        + ". Nobody tested what it says for truth, bias or harm.",
        "No licence was chosen, and nobody looked whether the data's allow one.",
    ]
    if told.predicts_next and tokenizer.chat_template is None:
        lines.insert(1, "It goes on with a text; nobody taught it to answer.")
    return "\n".join(f"- {line}" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
