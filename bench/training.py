"""`gptopt bench training`: whole steps of GPT-2 124M, ours, plain PyTorch's and nanoGPT's.

Every contender starts from the same weights and reads the same batches in the same order, so the
losses of its first steps are held against those of float32 before its speed is told.
"""

import contextlib
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptopt.bench.contenders import Unavailable
from gptopt.bench.contenders.nanogpt import load_peer, peer_weights
from gptopt.bench.limits import Limits
from gptopt.bench.records import Recorder, Row
from gptopt.bench.timing import (
    Spread,
    TimeBudget,
    balanced_orders,
    device_is_lost,
    free_memory,
    reason,
)
from gptopt.config import PRESETS, ModelConfig, TrainOptions
from gptopt.config_machine import BenchOptions
from gptopt.data import Sampler, TokenSplit
from gptopt.errors import CheckFailed
from gptopt.model import GPT
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.hardware import flops_per_token, synchronise
from gptopt.training.optimiser import build_optimiser
from gptopt.training.prefetch import Prefetched
from gptopt.training.pretraining import Blocks, NextToken
from gptopt.training.schedule import Schedule
from gptopt.training.session import Session
from gptopt.training.state import TrainState
from gptopt.training.step import Stepper

logger = logging.getLogger(__name__)

OURS, OURS_COMPILED = "gptopt", "gptopt + torch.compile"
REFERENCE, REFERENCE_COMPILED = "reference eager", "reference + torch.compile"
NANOGPT, NANOGPT_EAGER = "nanoGPT + torch.compile", "nanoGPT"
NAMES = (OURS, OURS_COMPILED, REFERENCE, REFERENCE_COMPILED, NANOGPT, NANOGPT_EAGER)

CHECKED_STEPS = 3
ROUNDS = 8
_LR = 6e-4

Expected = list[tuple[float, float]] | None  # per step its loss: exact, and in lower precision
Step = Callable[[], Tensor]  # one optimiser step; its loss stays on the device


@dataclass(frozen=True)
class Setting:
    """What all contenders train: shape, batch and how many steps a turn has."""

    model: ModelConfig
    batch_size: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_size * self.model.block_size


def setting(device: torch.device) -> Setting:
    """GPT-2 124M on a GPU, a toy elsewhere."""
    if device.type == "cuda":
        gpt2 = {**PRESETS["gpt2"]["model"], "vocab_size": 50304}
        return Setting(ModelConfig.model_validate(gpt2), 32, 5)
    toy = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=256)
    return Setting(toy, 2, 2)


def bench_training(
    options: BenchOptions,
    device: torch.device,
    limits: Limits,
    recorder: Recorder,
    budget: TimeBudget,
) -> None:
    """Measure whole steps in balanced turns; a row per contender.

    Raises:
        CheckFailed: an error of a contender left the GPU unusable for this process.
    """
    chosen = setting(device)
    narrow = torch.bfloat16 if device.type == "cuda" else torch.float32
    expected = _expected(chosen, device, narrow)
    runners: list[_Runner] = []
    for name, build in _contenders(chosen, device, narrow, options):
        if options.contenders and name not in options.contenders:
            continue
        if budget.is_spent() and runners:
            recorder.add({**_head(chosen, device, narrow, name), "error": "no time left"})
            continue
        logger.info("training: preparing %s", name)
        try:
            runners.append(_prepare(name, build, device, expected, narrow))
        except Exception as error:
            text = str(error) if isinstance(error, Unavailable) else reason(error)
            logger.warning("training: %s: %s", name, text)
            recorder.add({**_head(chosen, device, narrow, name), "error": text})
            del error
            free_memory()
            if device_is_lost(device):
                raise CheckFailed(
                    f"training: {name} left {device} unusable for this process; start again"
                    f" without it, with --contenders"
                ) from None
    _turns(runners, chosen, device, options.rounds or ROUNDS, budget)
    rate = limits.flops_per_s.get(str(narrow).removeprefix("torch."))
    flops = flops_per_token(GPT(chosen.model, kernels="reference"), chosen.model.block_size)
    for runner in runners:
        row = _head(chosen, device, narrow, runner.name)
        recorder.add({**row, **_result(runner, chosen, flops, rate)})


def _are_right(
    losses: list[float], expected: list[tuple[float, float]], dtype: torch.dtype
) -> bool:
    return all(
        abs(found - exact) <= 2 * abs(same - exact) + torch.finfo(dtype).eps * abs(exact)
        for found, (exact, same) in zip(losses, expected, strict=True)
    )


def _expected(chosen: Setting, device: torch.device, narrow: torch.dtype) -> Expected:
    """Losses of the first steps in float32 and in the bench's precision; None where that fails."""
    pairs = []
    for dtype in (torch.float32, narrow):
        try:
            pairs.append(_losses(_own(chosen, device, dtype, "reference", compiled=False)))
        except Exception as error:
            logger.warning("training: nothing can be checked: %s", reason(error))
            return None
        finally:
            free_memory()
    return list(zip(*pairs, strict=True))


@dataclass
class _Runner:
    name: str
    step: Step
    peak_bytes: int | None
    losses: list[float]
    correct: bool | None  # None: not checked
    seconds: list[float]
    error: str | None = None


def _prepare(
    name: str,
    build: Callable[[], Step],
    device: torch.device,
    expected: Expected,
    dtype: torch.dtype,
) -> _Runner:
    """Build a contender, take its checked steps, and read its peak memory in two more."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = build()
    losses = _losses(step)
    correct = None if expected is None else _are_right(losses, expected, dtype)
    if correct is False:
        logger.warning("training: %s is wrong: losses %s, expected %s", name, losses, expected)
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(), step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    return _Runner(name, step, peak, losses, correct, [])


def _turns(
    runners: list[_Runner], chosen: Setting, device: torch.device, rounds: int, budget: TimeBudget
) -> None:
    orders = balanced_orders(len(runners))
    for turn in range(rounds if runners else 0):
        if budget.is_spent() and turn >= 2:
            return
        for place in orders[turn % len(orders)]:
            runner = runners[place]
            if runner.error is not None:
                continue
            try:
                runner.step()  # clocks and caches are this contender's again
                synchronise(device)
                started = time.perf_counter()
                for _ in range(chosen.steps):
                    runner.step()
                synchronise(device)
                runner.seconds.append((time.perf_counter() - started) / chosen.steps)
            except Exception as error:
                runner.error = reason(error)


def _result(runner: _Runner, chosen: Setting, flops: float, rate: float | None) -> Row:
    found: Row = {
        "losses": runner.losses,
        "correct": runner.correct,
        "peak_bytes": runner.peak_bytes,
    }
    if runner.error is not None or not runner.seconds:
        return {**found, "error": runner.error or "no turn was finished"}
    spread = Spread.of([1e3 * seconds for seconds in runner.seconds])
    per_second = chosen.tokens / statistics.median(runner.seconds)
    mfu = flops * per_second / rate if rate else None
    return {**found, "step": vars(spread), "tokens_per_s": per_second, "mfu": mfu}


def _head(chosen: Setting, device: torch.device, dtype: torch.dtype, name: str) -> Row:
    shape = chosen.model
    return {
        "case": f"{shape.n_layer} x {shape.n_embd}, T {shape.block_size}, B {chosen.batch_size}",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "contender": name,
    }


def _losses(step: Step) -> list[float]:
    """Losses of the first steps."""
    losses = [step() for _ in range(CHECKED_STEPS)]
    found = [float(loss) for loss in losses]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"the losses of the first steps are {found}")
    return found


# --- contenders -----------------------------------------------------------------------------------


def _contenders(
    chosen: Setting, device: torch.device, dtype: torch.dtype, options: BenchOptions
) -> list[tuple[str, Callable[[], Step]]]:
    body: Body = "triton" if device.type == "cuda" else "reference"

    def own(kernels: "Body", compiled: bool) -> Callable[[], Step]:
        return lambda: _own(chosen, device, dtype, kernels, compiled=compiled)

    every = [(OURS, own(body, False)), (REFERENCE, own("reference", False))]
    if options.nanogpt is not None:
        folder, compiles = Path(options.nanogpt), device.type == "cuda"
        name = NANOGPT if compiles else NANOGPT_EAGER
        every.append((name, lambda: _nanogpt(folder, chosen, device, dtype, compiles)))
    if device.type == "cuda" or not options.quick:
        every += [
            (REFERENCE_COMPILED, own("reference", True)),
            (OURS_COMPILED, own(body, True)),
        ]
    return every


Body = Literal["reference", "triton"]


class RandomTokens:
    """Tokens to train on: what the loop asks of a data split, with nothing on disk."""

    def __init__(self, count: int, vocab_size: int) -> None:
        # A skewed distribution, so that there is something to learn in a few steps.
        draws = np.random.default_rng(5).random(count) ** 3
        self._ids = (draws * vocab_size).astype(np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, offsets: npt.ArrayLike, block_size: int) -> npt.NDArray[np.int64]:
        """Blocks of block_size + 1 tokens: (B, T + 1)."""
        starts = np.asarray(offsets, dtype=np.int64)[:, None]
        blocks: npt.NDArray[np.int64] = self._ids[starts + np.arange(block_size + 1)]
        return blocks


def _tokens(chosen: Setting) -> RandomTokens:
    assert chosen.model.vocab_size is not None
    return RandomTokens(64 * chosen.tokens, chosen.model.vocab_size)


def _model(chosen: Setting, kernels: Any) -> GPT:
    torch.manual_seed(7)
    return GPT(chosen.model, kernels=kernels)


def _own(
    chosen: Setting, device: torch.device, dtype: torch.dtype, kernels: Body, *, compiled: bool
) -> Step:
    """The step of `gptopt train`: its own loop's, optimiser, clipping and data path included."""
    options = TrainOptions(
        inputs=["random tokens"], out="nowhere", kernels=kernels, device=str(device),
        compile=compiled, steps=1_000_000, batch_size=chosen.batch_size, lr=_LR, min_lr=_LR,
        warmup_steps=0, schedule="constant", model=chosen.model,
    )  # fmt: skip
    model = _model(chosen, kernels).to(device).train()
    tokens = _tokens(chosen)
    sampler = Sampler(len(tokens), chosen.model.block_size, chosen.batch_size, options.seed)
    blocks = Blocks(cast(TokenSplit, tokens), sampler, chosen.model.block_size)
    session = Session(
        options=options,
        out=Path("nowhere"),
        device=device,
        dtype=dtype,
        objective=NextToken(options),
        model=model,
        optimiser=build_optimiser(model, options),
        scaler=None,
        batches=Prefetched(blocks, 1),
        dropout=torch.Generator().manual_seed(0),
        schedule=Schedule(options),
        state=TrainState(),
        fixed={},
        checkpoints=Checkpoints(Path("nowhere")),
    )
    stepper = Stepper(session)

    def step() -> Tensor:
        stepper.step(0.0)
        (_, _, figures) = stepper._unread.pop()  # what settle would read, and wait for
        return figures[0]

    return step


def _nanogpt(
    folder: Path, chosen: Setting, device: torch.device, dtype: torch.dtype, compiles: bool
) -> Step:
    """nanoGPT's own model, optimiser and step, from our weights and on our batches."""
    peer = load_peer(folder)
    shape = chosen.model
    config = peer.GPTConfig(
        block_size=shape.block_size, vocab_size=shape.vocab_size, n_layer=shape.n_layer,
        n_head=shape.n_head, n_embd=shape.n_embd, dropout=0.0, bias=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        model = peer.GPT(config)
        model.load_state_dict(peer_weights(_model(chosen, "reference")))
        model.to(device)
        optimiser = model.configure_optimizers(0.1, _LR, (0.9, 0.95), device.type)
    forward = torch.compile(model) if compiles else model
    tokens = _tokens(chosen)
    sampler = Sampler(len(tokens), shape.block_size, chosen.batch_size, 1337)
    precision = (
        contextlib.nullcontext()
        if dtype == torch.float32
        else torch.autocast(device.type, dtype=dtype)
    )

    def step() -> Tensor:
        block = torch.from_numpy(tokens.batch(sampler.next(), shape.block_size))
        if device.type == "cuda":
            block = block.pin_memory().to(device, non_blocking=True)
        with precision:
            _, loss = forward(block[:, :-1].contiguous(), block[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        found: Tensor = loss.detach()
        return found

    return step
