"""Everything one run works with, built fresh or from a checkpoint."""

import contextlib
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gptopt.checkpoint import LoadedModel, load_model, save_model
from gptopt.config import ModelConfig, TrainOptions
from gptopt.data import Dataset, Sampler, open_dataset
from gptopt.errors import CheckFailed, UserError
from gptopt.model import GPT
from gptopt.tokenizer import Tokenizer
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.hardware import dtype_name, refuse_too_large, resolve_device, resolve_dtype
from gptopt.training.optimiser import build_optimiser, load_optimiser_tensors, optimiser_tensors
from gptopt.training.resume import fixed_choices, refuse_changes
from gptopt.training.schedule import Schedule
from gptopt.training.state import TrainState, load_state, restore_random, save_state

OPTIMISER = "optimizer.safetensors"
VOCABULARY_MULTIPLE = 64  # matrix products like it; the ids in excess are never used


@dataclass
class Session:
    """A run in memory. `model` holds fp32 weights; `dtype` is the autocast precision."""

    options: TrainOptions
    out: Path
    device: torch.device
    dtype: torch.dtype
    dataset: Dataset
    model: GPT
    optimiser: torch.optim.AdamW
    scaler: torch.amp.GradScaler | None  # fp16 alone needs one
    sampler: Sampler
    dropout: torch.Generator  # draws the seed of every forward pass
    schedule: Schedule
    state: TrainState
    fixed: dict[str, Any]
    checkpoints: Checkpoints

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast for a forward pass; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def save(self) -> Path:
        """Write a checkpoint of this moment and prune old ones."""
        folder = self.checkpoints.save(self.state.step, self._write)
        self.checkpoints.prune(self.options.keep_checkpoints)
        return folder

    def _write(self, folder: Path) -> None:
        save_model(folder, self.model, self.dataset.tokenizer)
        tensors = optimiser_tensors(self.model, self.optimiser)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / OPTIMISER)
        self.state.sampler = self.sampler.state_dict()
        self.state.scaler = self.scaler.state_dict() if self.scaler else {}
        self.state.warm_end = self.schedule.warm_end
        save_state(folder, self.state, self.fixed, self.dropout)


def open_session(options: TrainOptions, out: Path, checkpoint: Path | None) -> Session:
    """Build a run from its options, or continue it from one of its checkpoints.

    Raises:
        UserError: text, model, tokenizer and options do not fit each other or the checkpoint.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    _seed_everything(options.seed)
    start = _starting_model(options, checkpoint)
    dataset = _open_data(options, out, start, checkpoint)
    state, saved = load_state(checkpoint) if checkpoint else (TrainState(), None)
    config = _model_config(options, dataset.tokenizer, start, saved)
    fixed = fixed_choices(
        options, config, dtype_name(dtype), dataset.sha256, dataset.tokenizer.sha256
    )
    if saved is not None:
        refuse_changes(options.out, saved, fixed)
        state.go_on(options)
    _refuse_short_corpus(options, dataset, config)
    refuse_too_large(config, device)
    model = _build_model(options, config, start, device)
    session = Session(
        options=options,
        out=out,
        device=device,
        dtype=dtype,
        dataset=dataset,
        model=model,
        optimiser=build_optimiser(model, options),
        scaler=torch.amp.GradScaler(device.type) if dtype == torch.float16 else None,
        sampler=Sampler(len(dataset.train), config.block_size, options.batch_size, options.seed),
        dropout=torch.Generator().manual_seed(options.seed),
        schedule=Schedule(options, state.warm_end),
        state=state,
        fixed=fixed,
        checkpoints=Checkpoints(out),
    )
    if checkpoint:
        _restore(session, checkpoint)
    return session


def _open_data(
    options: TrainOptions, out: Path, start: LoadedModel | None, checkpoint: Path | None
) -> Dataset:
    tokenizer = start.tokenizer if start and options.init_from else None
    cache = out / "data"
    try:
        return open_dataset(options.inputs, options.data, tokenizer=tokenizer, cache=cache)
    except UserError:
        if checkpoint is not None or not cache.exists():
            raise
        # What an earlier attempt tokenised from other text or options: no checkpoint needs it.
        shutil.rmtree(cache)
        return open_dataset(options.inputs, options.data, tokenizer=tokenizer, cache=cache)


def _starting_model(options: TrainOptions, checkpoint: Path | None) -> LoadedModel | None:
    source = checkpoint or options.init_from
    if source is None:
        return None
    # On the CPU, so that the GPU never holds them twice; in fp32, however narrow they were stored.
    return load_model(source, device="cpu", dtype=torch.float32, kernels=options.kernels)


def _model_config(
    options: TrainOptions,
    tokenizer: Tokenizer,
    start: LoadedModel | None,
    saved: dict[str, Any] | None,
) -> ModelConfig:
    """The model's shape with its vocabulary filled in."""
    config = options.model
    if options.init_from is not None and start is not None:
        config = _taken_over(options, start.model.config, resuming=saved is not None)
    if config.vocab_size is None:
        size = -(-tokenizer.size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        config = config.model_copy(update={"vocab_size": size})
    assert config.vocab_size is not None
    if config.vocab_size < tokenizer.size:
        raise UserError(
            f"--model.vocab-size {config.vocab_size}: the tokenizer has {tokenizer.size} ids; give"
            f" at least that, or leave the option out"
        )
    if not config.causal:
        raise UserError("model.causal=false: next-token training needs a causal model")
    _refuse_other_tokenizer(options, tokenizer, start, saved)
    return config


def _taken_over(options: TrainOptions, config: ModelConfig, *, resuming: bool) -> ModelConfig:
    """The loaded model's shape; a flag may repeat it, and may choose another dropout."""
    explicit = {name: getattr(options.model, name) for name in options.model.model_fields_set}
    for name, value in explicit.items():
        found = getattr(config, name)
        if name != "dropout" and value != found and not resuming:
            raise UserError(
                f"--model.{name.replace('_', '-')} {value}: the model {options.init_from} has"
                f" {found}; leave the option out, or train without --init-from"
            )
    # A resumed run compares the explicit values with its own later, and names the difference.
    return config.model_copy(update=explicit)


def _refuse_other_tokenizer(
    options: TrainOptions,
    tokenizer: Tokenizer,
    start: LoadedModel | None,
    saved: dict[str, Any] | None,
) -> None:
    if start is None or start.tokenizer is None or saved is not None:
        return
    if start.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"--init-from {options.init_from}: its tokenizer is not the one of {options.inputs[0]};"
            f" tokenise the text with gptopt tokenize --tokenizer {options.init_from}"
        )


def _refuse_short_corpus(options: TrainOptions, dataset: Dataset, config: ModelConfig) -> None:
    tokens, needed = len(dataset.train), config.block_size + 1
    if tokens < needed:
        raise UserError(
            f"{', '.join(options.inputs)}: {tokens} training tokens are fewer than the {needed} of"
            f" one block; give more text, or a smaller --model.block-size"
        )


def _build_model(
    options: TrainOptions, config: ModelConfig, start: LoadedModel | None, device: torch.device
) -> GPT:
    model = GPT(config, kernels=options.kernels)
    if start is not None:
        # Copied, so that weights from any file lie in memory as a fresh model's do: the layout
        # decides how a product rounds, and a resumed run repeats every bit.
        model.load_state_dict(start.model.state_dict())
    return model.to(device).train()


def _restore(session: Session, checkpoint: Path) -> None:
    try:
        tensors = load_file(checkpoint / OPTIMISER)  # on the CPU, freed after use
        load_optimiser_tensors(session.model, session.optimiser, tensors)
        session.sampler.load_state_dict(session.state.sampler)
        if session.scaler:
            session.scaler.load_state_dict(session.state.scaler)
        restore_random(checkpoint, session.dropout)
    except (KeyError, TypeError, ValueError) as error:
        # Its manifest holds, so it was written like this: by another version.
        raise CheckFailed(
            f"{checkpoint}: not a checkpoint this version can resume ({error!r}); use it with"
            f" --init-from instead"
        ) from None


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
