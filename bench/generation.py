"""`gptopt bench generate`: greedy decoding of GPT-2 124M, tokens per second at batch 1 and 32.

A call that makes one token is subtracted from one that makes many, so reading the prompt does not
count. What was generated is read again by the float32 reference: each token has to be its best one,
or as good as that within what the precision allows.
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

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
from gptopt.config import PRESETS, ModelConfig, SamplingOptions
from gptopt.config_machine import BenchOptions
from gptopt.errors import CheckFailed
from gptopt.generate import generate_tokens
from gptopt.model import GPT
from gptopt.training.hardware import synchronise

logger = logging.getLogger(__name__)

OURS, REFERENCE = "gptopt", "reference eager"
NAMES = (OURS, REFERENCE)
BATCHES = (1, 32)
ROUNDS = 4

Generate = Callable[[int], list[list[int]]]


@dataclass(frozen=True)
class Setting:
    """The model, and how many tokens are read and made."""

    model: ModelConfig
    prompt_tokens: int
    new_tokens: int


def setting(device: torch.device) -> Setting:
    """GPT-2 124M on a GPU, a toy elsewhere. The head is not tied: see `_model`."""
    if device.type == "cuda":
        gpt2 = {**PRESETS["gpt2"]["model"], "vocab_size": 50304, "tie_head": False}
        return Setting(ModelConfig.model_validate(gpt2), 32, 128)
    toy = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=256, tie_head=False)
    return Setting(toy, 4, 16)


def bench_generation(
    options: BenchOptions,
    device: torch.device,
    limits: Limits,
    recorder: Recorder,
    budget: TimeBudget,
) -> None:
    """Measure decoding in balanced turns; a row per batch size and contender.

    Raises:
        CheckFailed: an error of a contender left the GPU unusable for this process.
    """
    chosen = setting(device)
    for batch in BATCHES:
        if budget.is_spent():
            logger.warning("--minutes is spent: batch %d is not measured", batch)
            return
        _batch(options, chosen, device, limits, recorder, batch)
        free_memory()
        if device_is_lost(device):
            raise CheckFailed(
                f"generate: an error left {device} unusable for this process; {recorder.rows}"
                f" rows are in {recorder.path}"
            )


def _batch(
    options: BenchOptions,
    chosen: Setting,
    device: torch.device,
    limits: Limits,
    recorder: Recorder,
    batch: int,
) -> None:
    narrow = torch.bfloat16 if device.type == "cuda" else torch.float32
    numbers = torch.arange(batch * chosen.prompt_tokens).view(batch, -1)
    prompts = (numbers * 7919 % 1000 % (chosen.model.vocab_size or 1)).tolist()
    judge = _Judge(chosen, device, narrow, prompts)
    runners: dict[str, Generate] = {}
    rates: dict[str, list[float]] = {}
    verdicts: dict[str, Row] = {}
    errors: dict[str, str] = {}
    for name in NAMES:
        if options.contenders and name not in options.contenders:
            continue
        rates[name] = []
        try:
            runners[name] = _generator(name, chosen, device, narrow, prompts)
            verdicts[name] = judge.judge(runners[name](chosen.new_tokens))
            if not verdicts[name]["correct"]:
                logger.warning("generate: %s is wrong: %s", name, verdicts[name])
        except Exception as error:
            errors[name] = reason(error)
            logger.warning("generate: %s: %s", name, errors[name])
            runners.pop(name, None)
            del error
            free_memory()
    names = list(runners)
    orders = balanced_orders(len(names))
    for turn in range((options.rounds or ROUNDS) if names else 0):
        for place in orders[turn % len(orders)]:
            name = names[place]
            if name in errors:
                continue
            try:
                rates[name].append(_rate(runners[name], batch, chosen.new_tokens, device))
            except Exception as error:
                errors[name] = reason(error)
    for name, found in rates.items():
        row = _head(chosen, device, narrow, batch, name) | verdicts.get(name, {})
        if name in errors or not found:
            recorder.add({**row, "error": errors.get(name, "no turn was finished")})
        else:
            recorder.add({**row, **_result(found, chosen, limits, narrow, batch)})


def _rate(generate: Generate, batch: int, new_tokens: int, device: torch.device) -> float:
    """Decoded tokens per second, all rows together."""
    seconds = []
    for count in (1, new_tokens):
        synchronise(device)
        started = time.perf_counter()
        made = generate(count)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
        assert all(len(row) == count for row in made)  # an early end would be a false speed
    return batch * (new_tokens - 1) / max(seconds[1] - seconds[0], 1e-9)


def _head(chosen: Setting, device: torch.device, dtype: torch.dtype, batch: int, name: str) -> Row:
    shape = chosen.model
    return {
        "case": f"{shape.n_layer} x {shape.n_embd}, {chosen.prompt_tokens} + {chosen.new_tokens}",
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "contender": name,
    }


def _result(
    rates: list[float], chosen: Setting, limits: Limits, dtype: torch.dtype, batch: int
) -> Row:
    per_second = statistics.median(rates)
    # Each step reads every weight of a product once, whatever the batch.
    weights = sum(
        parameter.numel()
        for name, parameter in _model(chosen, "reference").named_parameters()
        if not name.startswith(("wte.", "wpe."))
    )
    limit = batch * limits.bytes_per_s / (weights * dtype.itemsize)
    return {
        "tokens_per_s": per_second,
        "step": vars(Spread.of([1e3 * batch / rate for rate in rates])),
        "limit_tokens_per_s": limit,
        "share_of_limit": per_second / limit,
    }


def _model(chosen: Setting, kernels: str) -> GPT:
    """Random weights whose text does not repeat one token: wide, and with a head of its own.

    A random GPT-2 with a tied head says its own input again, whatever its blocks do.
    """
    torch.manual_seed(3)
    model = GPT(chosen.model, kernels=kernels)  # type: ignore[arg-type]  # a contender's name
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and parameter.ndim == 2:
                parameter.mul_(3.0)
    return model.eval()


def _generator(
    name: str,
    chosen: Setting,
    device: torch.device,
    dtype: torch.dtype,
    prompts: list[list[int]],
) -> Generate:
    body = "triton" if name == OURS and device.type == "cuda" else "reference"
    model = _model(chosen, body).to(device, dtype)

    def generate(count: int) -> list[list[int]]:
        sampling = SamplingOptions(temperature=0, max_new_tokens=count)
        done = generate_tokens(model, prompts, sampling)
        return [row.tokens for row in done.rows]

    return generate


class _Judge:
    """The float32 reference, and how far the same model in the bench's precision strays from it."""

    def __init__(
        self, chosen: Setting, device: torch.device, dtype: torch.dtype, prompts: list[list[int]]
    ) -> None:
        self._exact = _model(chosen, "reference").to(device)
        self._same = _model(chosen, "reference").to(device, dtype)
        self._device, self._dtype, self._prompts = device, dtype, prompts

    @torch.no_grad()
    def judge(self, made: list[list[int]]) -> Row:
        """Whether each token is the best of the reference, or nearly, after the same tokens."""
        short, allowed = 0.0, 0.0
        for prompt, tokens in zip(self._prompts[:4], made[:4], strict=True):
            ids = torch.tensor([prompt + tokens[:-1]], device=self._device)
            exact = self._exact(ids).logits[0, len(prompt) - 1 :].double()  # (N, V)
            same = self._same(ids).logits[0, len(prompt) - 1 :].double()
            chosen = exact.gather(1, torch.tensor(tokens, device=self._device)[:, None])[:, 0]
            short = max(short, float((exact.amax(dim=1) - chosen).max()))
            band = torch.finfo(self._dtype).eps * float(exact.abs().max())
            # Two logits are compared, and either may be off.
            allowed = max(allowed, 4 * float((same - exact).abs().max()) + 2 * band)
        distinct = len({token for tokens in made for token in tokens})
        return {
            "correct": short <= allowed,
            "short_by": short,
            "allowed": allowed,
            "distinct_tokens": distinct,
        }
