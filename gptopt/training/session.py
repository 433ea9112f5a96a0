"""Everything one run works with, built fresh or from a checkpoint."""

import contextlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptopt.checkpoint import LoadedModel, load_model, save_model
from gptopt.config import LoopOptions, ModelConfig
from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import write_json
from gptopt.model import GPT
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.distributed import ALONE, World, launched, micro_batches, rank_device
from gptopt.training.graph import refuse_graph
from gptopt.training.hardware import (
    dtype_name,
    precision,
    refuse_too_large,
    resolve_device,
    resolve_dtype,
    synchronise,
)
from gptopt.training.objective import Objective
from gptopt.training.optimiser import (
    build_optimiser,
    empty_optimiser_tensors,
    load_optimiser_tensors,
    optimiser_tensors,
)
from gptopt.training.parallel import checkpoint_activations, gather_no_more, shard, whole
from gptopt.training.prefetch import Prefetched
from gptopt.training.resume import fixed_choices, refuse_changes
from gptopt.training.rounding import MASTER, Rounding
from gptopt.training.saving import INDEX, Keep, Saver, Snapshot
from gptopt.training.schedule import Schedule
from gptopt.training.state import (
    TrainState,
    capture_state,
    load_state,
    restore_random,
    write_state,
)

OPTIMISER = "optimizer.safetensors"


@dataclass
class Session:
    """A run in memory. `model` holds fp32 weights; `dtype` is the autocast precision."""

    options: LoopOptions
    out: Path
    device: torch.device
    dtype: torch.dtype
    objective: Objective
    model: GPT
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16 alone needs one
    batches: Prefetched
    dropout: torch.Generator  # draws the seed of every forward pass
    schedule: Schedule
    state: TrainState
    fixed: dict[str, Any]
    checkpoints: Checkpoints
    rounding: Rounding | None = None  # of --qat
    accumulate: int = 1  # micro-batches of a step
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        self.saver = Saver(self)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward pass."""
        return precision(self.device, self.dtype)

    def rounded(self) -> contextlib.AbstractContextManager[Any]:
        """Around what the model does: its weights are as --qat rounds them, if it does."""
        return self.rounding.applied(self.model) if self.rounding else contextlib.nullcontext()

    def snapshot(self, keep: Keep) -> Snapshot:
        """All that a checkpoint of this moment says, `keep` having copied each tensor.

        Weights are gathered whole, for every checkpoint is a model folder; moments stay in parts.
        All ranks must call it.
        """
        gather_no_more(self.model)
        state, first = self.state, self.world.is_first
        state.sampler = self.batches.state_dict()
        state.scaler = self.scaler.state_dict() if self.scaler else {}
        state.warm_end = self.schedule.warm_end
        weights, masters = {}, {}
        adapter_only = self.model.lora is not None
        for name, weight in self.model.named_parameters():
            if weight.requires_grad or not adapter_only:
                full = whole(weight.detach())
                if first and self.rounding:
                    weights[name] = keep(name, self.rounding(name, full))
                    masters[MASTER + name] = full
                elif first:
                    weights[name] = keep(name, full)
        moments, name, index = optimiser_tensors(self.model, self.optimiser), OPTIMISER, None
        if self.world.sharded:
            from gptopt.training.sharded import ShardWriter, save_sharded

            writer = ShardWriter(OPTIMISER, keep)
            save_sharded(writer, moments, self.world.control)
            moments, name, index = writer.tensors, writer.file, writer.index
        else:
            moments = {key: keep(key, value) for key, value in moments.items() if first}
        captured = capture_state(state, self.fixed, self.dropout)
        if first and self.rounding:
            masters |= self.rounding.grids()
        moments |= {key: keep(key, value) for key, value in masters.items()}
        synchronise(self.device)
        return Snapshot(state.step, weights, moments, name, index, captured)

    def write(self, folder: Path, snapshot: Snapshot) -> None:
        """This rank's files of a checkpoint; nothing of the run as it is now is read."""
        moments = {name: value.contiguous() for name, value in snapshot.moments.items()}
        save_file(moments, folder / snapshot.moments_file)
        if not self.world.is_first:
            return
        save_model(folder, self.model, self.objective.tokenizer, state=snapshot.weights)
        write_state(folder, snapshot.state)
        if snapshot.moments_index is not None:
            write_json(folder / f"{OPTIMISER}{INDEX}", snapshot.moments_index)


def open_session(
    objective: Objective, out: Path, checkpoint: Path | None, world: World = ALONE
) -> Session:
    """Build a run for its objective, or continue it from one of its checkpoints.

    Raises:
        UserError: data, model, tokenizer and options do not fit each other or the checkpoint.
    """
    options, resuming = objective.options, checkpoint is not None
    device = resolve_device(rank_device(options.device, launched()))
    dtype = resolve_dtype(options.dtype, device)
    _seed_everything(options.seed)
    start = starting_model(options, checkpoint)
    world.on_first(lambda: objective.open(out, start, resuming=resuming))
    if not world.is_first:  # what rank 0 may have tokenised
        objective.open(out, start, resuming=resuming)
    state, saved = load_state(checkpoint) if checkpoint else (TrainState(), None)
    config = objective.model_config(start, resuming=resuming)
    fixed = fixed_choices(objective, config, dtype_name(dtype))
    if saved is not None:
        refuse_changes(options.out, saved, fixed)
    rounding = None if options.qat is None else Rounding(config, options.qat)
    if rounding is not None and world.sharded:
        raise UserError(
            "--qat: rounds whole matrices, of which --parallel fsdp gives each rank a part; use ddp"
        )
    refuse_too_large(config, device, world.size if world.sharded else 1)
    state.sequences = state.sequences or options.batch_size * options.accumulate * world.size
    accumulate = micro_batches(state.sequences, options.batch_size, world.size)
    if options.cuda_graph:
        flags = {"--compile": options.compile, "--qat": options.qat, "a teacher": objective.teacher}
        refuse_graph(
            device, dtype, ranks=world.size, accumulate=accumulate,
            others=[flag for flag, given in flags.items() if given],
        )  # fmt: skip
    batches = objective.batches(config, state.sequences // accumulate, world.rank, world.size)
    options = options.model_copy(update={"steps": objective.steps(state.sequences)})
    state.go_on(options)
    model = _build_model(objective, config, start, device, dtype, world).train()
    if rounding is not None and start is not None and not resuming:
        rounding.keep_grids(model, start.model.state_dict())
    session = Session(
        options=options,
        out=out,
        device=device,
        dtype=dtype,
        objective=objective,
        model=model,
        optimiser=build_optimiser(model, options),
        scaler=torch.amp.GradScaler(device.type) if dtype == torch.float16 else None,
        batches=Prefetched(batches, ahead=accumulate),
        dropout=torch.Generator().manual_seed(options.seed),
        schedule=Schedule(options, state.warm_end),
        state=state,
        fixed=fixed,
        checkpoints=Checkpoints(out),
        rounding=rounding,
        accumulate=accumulate,
        world=world,
    )
    if checkpoint:
        _restore(session, checkpoint)
    return session


def _build_model(
    objective: Objective,
    config: ModelConfig,
    start: LoadedModel | None,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
) -> GPT:
    if world.sharded and not world.is_first and start is None:
        with torch.device("meta"):  # rank 0 draws the weights
            model = objective.build(config, None)
    else:
        model = objective.build(config, start)
    if objective.options.activation_checkpointing:
        checkpoint_activations(model)
    return shard(model, device, dtype, world) if world.sharded else model.to(device)


def starting_model(options: LoopOptions, checkpoint: Path | None) -> LoadedModel | None:
    """What a run continues from, or begins with; None where its weights are drawn."""
    source = checkpoint or options.init_from
    if source is None:
        return None
    # On the CPU, so that the GPU never holds them twice; in fp32, however narrow they were stored.
    return load_model(source, device="cpu", dtype=torch.float32, kernels=options.kernels)


def _restore(session: Session, checkpoint: Path) -> None:
    try:
        moments = _moments(session, checkpoint)
        if session.rounding:
            _restore_masters(session.model, moments)
            session.rounding.take_grids(moments, session.device)
        load_optimiser_tensors(session.model, session.optimiser, moments)
        session.batches.load_state_dict(session.state.sampler)
        if session.scaler:
            session.scaler.load_state_dict(session.state.scaler)
        restore_random(checkpoint, session.dropout)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        # Its manifest holds, so it was written like this: by another version.
        raise CheckFailed(
            f"{checkpoint}: not a checkpoint this version can resume ({error!r}); use it with"
            f" --init-from instead"
        ) from None


def _restore_masters(model: GPT, moments: dict[str, Tensor]) -> None:
    """The weights that are trained; the checkpoint's own are these, rounded."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(moments.pop(MASTER + name))


def _moments(session: Session, checkpoint: Path) -> dict[str, Tensor]:
    """Whole or in parts, as this session's model is, however they were saved."""
    if (checkpoint / OPTIMISER).is_file() and not session.world.sharded:
        tensors: dict[str, Tensor] = load_file(checkpoint / OPTIMISER)
        return tensors  # on the CPU, freed after use
    # Imported here alone: it takes torch as long as all else together.
    from gptopt.training.sharded import ShardReader, load_sharded

    reader = ShardReader(checkpoint, OPTIMISER)
    targets = empty_optimiser_tensors(session.model, session.optimiser, reader.shapes)
    load_sharded(reader, targets, session.world.control)
    return targets


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
