"""The train verb: decide whether to start, continue or stop, then train, draw and report."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

from gptopt.config import LoopOptions
from gptopt.errors import UserError, first_line
from gptopt.log import say
from gptopt.manifest import read_json, write_json
from gptopt.training.card import write_cards
from gptopt.training.checkpoints import Checkpoints, step_of
from gptopt.training.distributed import World, join_world
from gptopt.training.estimate import dry_run
from gptopt.training.folder import log_to_file, refuse_foreign, write_config
from gptopt.training.hardware import device_name, dtype_name, environment, matmul_peak
from gptopt.training.lock import LOCK, hold_lock
from gptopt.training.loop import Trainer
from gptopt.training.metrics import METRICS, Metrics
from gptopt.training.objective import Objective, Told
from gptopt.training.plot import draw_loss
from gptopt.training.resume import refuse_changed_options
from gptopt.training.session import Session, open_session
from gptopt.training.spikes import SPIKES
from gptopt.training.state import load_state
from gptopt.training.step import DIVERGED
from gptopt.training.trackers import Trackers, require_trackers

logger = logging.getLogger(__name__)

RESULT = "result.json"  # its presence says that the run was finished
ENVIRONMENT = "env.json"
PICTURE = "loss.png"


def run(objective: Objective) -> dict[str, Any]:
    """Train as `gptopt.training.train` documents."""
    options = objective.options
    if options.dry_run:
        return dry_run(objective)
    out = Path(options.out)
    with join_world(options) as world, contextlib.ExitStack() as held:
        if world.sharded and options.sample_every:
            raise UserError(
                "--sample-every: under --parallel fsdp no rank holds the whole model; leave it out,"
                " and use gptopt generate on the run's checkpoints"
            )
        name = world.on_first(lambda: _take_folder(options, out, held))
        if not (out / LOCK).exists():
            raise UserError(
                f"{out}: rank {world.rank} does not see what rank 0 wrote there; choose an --out on"
                f" a file system that all machines share"
            )
        checkpoint = Checkpoints(out).folder / name if name else None
        result = _finished(objective, out, checkpoint) or _train(objective, out, checkpoint, world)
    if world.is_first and not options.json_output:
        _tell(result)
    return result


def _take_folder(options: LoopOptions, out: Path, held: contextlib.ExitStack) -> str | None:
    """Hold the run folder until `held` is closed; the name of the checkpoint to resume."""
    require_trackers(options.track)
    refuse_foreign(out)
    held.enter_context(hold_lock(out))
    held.enter_context(log_to_file(out))
    checkpoints = Checkpoints(out)
    checkpoints.clean()
    checkpoint = _checkpoint_to_resume(options, checkpoints)
    return checkpoint.name if checkpoint else None


def _checkpoint_to_resume(options: LoopOptions, checkpoints: Checkpoints) -> Path | None:
    found = checkpoints.all()
    if not found:
        return None
    if not options.resume:
        raise UserError(
            f"{options.out}: holds a run already (last checkpoint {found[-1].name}); continue it"
            f" with --resume, or choose another --out"
        )
    newest = checkpoints.newest()
    if newest is None:
        raise UserError(f"{checkpoints.folder}: every checkpoint is damaged; choose another --out")
    return newest


def _finished(objective: Objective, out: Path, checkpoint: Path | None) -> dict[str, Any] | None:
    """The result of a run that is complete already."""
    if checkpoint is None or not (out / RESULT).is_file():
        return None
    state, saved = load_state(checkpoint)
    refuse_changed_options(objective, saved)
    result = read_json(out / RESULT)
    if not state.is_finished(objective.options) or result.get("steps") != state.step:
        return None
    logger.info("%s: complete at step %d, nothing to do", out, state.step)
    return {**result, "already_complete": True}


def _train(
    objective: Objective, out: Path, checkpoint: Path | None, world: World
) -> dict[str, Any]:
    try:
        session = open_session(objective, out, checkpoint, world)
        peak = matmul_peak(session.device, session.dtype) if world.is_first else None
        first_step = world.on_first(lambda: _prepare_folder(session, checkpoint, peak))
        with Trackers() as trackers:
            world.on_first(lambda: trackers.start(session.options, out, first_step=first_step))
            Trainer(session, peak and peak * world.size, trackers).run()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise UserError(
            f"{out}: out of memory ({first_line(error)}); choose a smaller --batch-size with"
            f" --accumulate, a smaller model, or a shorter --model.block-size"
        ) from None
    return world.on_first(lambda: _write_result(session, checkpoint))


def _prepare_folder(session: Session, checkpoint: Path | None, peak: float | None) -> int:
    """What a run folder says before its first step, of this start and no earlier one.

    Returns:
        The first step whose line is still to be written; 0 for a fresh run.
    """
    out, state = session.out, session.state
    here = environment(session.device, session.dtype, session.options, peak, session.world)
    if checkpoint is None:
        session.checkpoints.forget()
    else:
        _tell_changes(session, out / ENVIRONMENT, here)
    for name in (RESULT, DIVERGED):
        (out / name).unlink(missing_ok=True)
    write_config(out, session.options)
    write_json(out / ENVIRONMENT, here)
    # The checkpoint's own line is kept too, unless it was still to be written.
    written = state.todo is None or state.todo.line is None
    first_dropped = state.step + written if checkpoint else 0
    for name in (METRICS, SPIKES):
        Metrics(out, name).truncate(first_dropped)
    _introduce(session, checkpoint)
    return first_dropped


_BITS = (
    "torch", "device_name", "torch_threads", "operators", "compile", "cuda_graph", "ranks",
    "parallel", "activation_checkpointing",
)  # fmt: skip


def _tell_changes(session: Session, path: Path, here: dict[str, Any]) -> None:
    """What is allowed to change on a resume, but may change the last bits of what is computed.

    Raises:
        UserError: something did, under --exact.
    """
    missing = {} if session.options.exact else here
    before = read_json(path) if path.is_file() else missing
    for name in _BITS:
        old, new = before.get(name), here[name]
        if old == new:
            continue
        if session.options.exact:
            raise UserError(
                f"{session.out}: --exact: {name} was {old} and is {new} now; resume as the run was"
                f" started, or without --exact"
            )
        logger.warning(
            "%s was %s and is %s now: the run goes on, but not bit for bit as it would have",
            name, old, new,
        )  # fmt: skip
    if before.get("ranks", 1) != here["ranks"]:
        logger.warning(
            "resharded from %s to %d ranks: a step still reads %d sequences, %d at a time",
            before.get("ranks", 1), here["ranks"],
            session.state.sequences, session.state.sequences // session.accumulate,
        )  # fmt: skip


def _introduce(session: Session, checkpoint: Path | None) -> None:
    options = session.options
    if checkpoint:
        logger.info("%s: continuing from %s", session.out, checkpoint.name)
    logger.info(
        "%s parameters on %s (%s, %s); %s; %s sequences of %s tokens a step",
        f"{session.model.num_parameters():,}",
        session.device,
        device_name(session.device),
        dtype_name(session.dtype),
        session.objective.describe(),
        f"{session.state.sequences:,}",
        f"{session.objective.block_size:,}",
    )
    if options.max_seconds is None and options.warmup_steps >= options.steps:
        logger.warning(
            "warmup_steps=%d is not below steps=%d: the run ends while warming up",
            options.warmup_steps,
            options.steps,
        )


def _write_result(session: Session, checkpoint: Path | None) -> dict[str, Any]:
    told = session.objective.told()
    result = _result(session, checkpoint, told)
    write_cards(session, result, told)
    write_json(session.out / RESULT, result)
    return result


def _result(session: Session, checkpoint: Path | None, told: Told) -> dict[str, Any]:
    state, out, checkpoints = session.state, session.out, session.checkpoints
    last, best = checkpoints.pointed("latest"), checkpoints.pointed("best")
    drawn = draw_loss(out / METRICS, out / PICTURE, f"{out.name}: loss")
    with session.rounded():
        finished = session.objective.finish(session.model, out)
    return {
        "out": str(out),
        "steps": state.step,
        "stopped_by": state.stopped_by,
        "train_loss": state.train_loss,
        "val_loss": state.val_loss,
        "best_val_loss": state.best_val_loss,
        "best_step": state.best_step,
        "bits_per_byte": told.bits_per_byte(state.best_val_loss),
        "tokens": state.tokens,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens_per_second,
        "mfu": state.mfu,
        "skipped": state.skipped,
        "parameters": session.model.num_parameters(),
        "device": str(session.device),
        "dtype": dtype_name(session.dtype),
        "checkpoint": str(last) if last else None,
        "best_checkpoint": str(best) if best else None,
        "loss_curve": str(out / PICTURE) if drawn else None,
        **finished,
        "resumed_from": step_of(checkpoint) if checkpoint else None,
        "already_complete": False,
    }


def _tell(result: dict[str, Any]) -> None:
    complete = " (was complete already)" if result["already_complete"] else ""
    lines = {
        "run": result["out"] + complete,
        "steps": f"{result['steps']:,} in {result['seconds']:.0f} s",
        "training loss": _loss(result["train_loss"]),
        "validation loss": _loss(result["val_loss"]),
        "best of them": _loss(result["best_val_loss"]),
        "checkpoint": result["best_checkpoint"] or result["checkpoint"],
        "accuracy": _loss(result.get("val_accuracy")),
        "f1": _loss(result.get("val_f1")),
        "loss curve": result["loss_curve"],
        "mistakes": result.get("confusion_matrix"),
    }
    for name, value in lines.items():
        if value is not None:
            say(f"{name:<17}{value}")


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
