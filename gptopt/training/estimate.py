"""`--dry-run`: what a run would hold, compute and write, found out without running it.

The run's own model, loss and optimiser take two steps on tensors that have shapes and no values, so
that what is counted is what the step really makes, whatever the model or the objective.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils import clip_grads_with_norm_

from gptopt.config import LoopOptions
from gptopt.errors import UserError
from gptopt.kernels import explain
from gptopt.log import say
from gptopt.model import GPT
from gptopt.training.distributed import launched
from gptopt.training.hardware import (
    dtype_name,
    flops_per_token,
    matmul_peak,
    precision,
    resolve_device,
    resolve_dtype,
    total_memory_bytes,
)
from gptopt.training.memory import FakeTensorMode, Meter, bytes_of, without_values
from gptopt.training.objective import Batch, Objective
from gptopt.training.optimiser import build_optimiser, optimiser_tensors
from gptopt.training.parallel import checkpoint_activations, gradient_norm
from gptopt.training.rounding import Rounding
from gptopt.training.session import starting_model

_STEPS = 2  # the second one begins with moments


class Footprint(NamedTuple):
    """Bytes of a step's tensors."""

    weights: int
    gradients: int
    optimiser: int
    activations: int  # that one micro-batch keeps for its backward pass
    peak: int


def dry_run(objective: Objective) -> dict[str, Any]:
    """Say what a run would need, on this device, as one process; write nothing.

    Returns:
        parameters (by group, and total and trained), weights_bytes, gradients_bytes,
        optimiser_bytes, masters_bytes (copies that --qat keeps), teacher_bytes, activations_bytes
        (kept for the backward pass of one micro-batch) and peak_bytes (of all tensors, the least
        that an allocator can do with), both also _checkpointed: with --activation-checkpointing;
        device, device_bytes (its memory), fits (null where that is not known), dtype, steps,
        tokens_per_step, flops_per_token, matmul_peak_flops (measured here, null where it cannot
        be), tokens_per_second_at_most and seconds_at_least (at that peak), checkpoint_bytes
        (without the grids of --qat, 1 % of it) and saving_bytes (its copy in host memory, 0 with
        --sync-save).

    Raises:
        UserError: the options or the data do not allow the run, or there are several processes.
    """
    options = objective.options
    launch = launched()
    if options.resume or (launch is not None and launch.size > 1):
        raise UserError(
            "--dry-run: estimates a run of one process from its beginning; leave --resume and"
            " torchrun out"
        )
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    start = starting_model(options, None)
    with tempfile.TemporaryDirectory() as scratch:  # for text that is tokenised on the way
        objective.open(Path(scratch), start, resuming=False)
        config = objective.model_config(start, resuming=False)
        batch = objective.batches(config, options.batch_size, 0, 1).next()
    steps = objective.steps(options.batch_size * options.accumulate)
    if options.kernels == "auto":
        explain(device, prove=True)  # with real tensors, before there are none
    with contextlib.nullcontext() if start else torch.device("meta"):
        model = objective.build(config, start).train()
    masters = rounded = 0
    if options.qat is not None:
        rounding = Rounding(config, options.qat)
        masters = bytes_of(model.parameters())
        rounded = bytes_of(p for name, p in model.named_parameters() if rounding.rounds(name, p))
    plain = _footprint(objective, model, batch, device, dtype)
    checkpoint_activations(model)
    checkpointed = _footprint(objective, model, batch, device, dtype)
    teacher = bytes_of(objective.teacher.parameters()) if objective.teacher else 0
    chosen = checkpointed if options.activation_checkpointing else plain
    there = total_memory_bytes(device)
    tokens = batch.tokens * options.accumulate
    flops = flops_per_token(model, objective.block_size)
    rate = matmul_peak(device, dtype)
    saved = bytes_of(p for p in model.parameters() if p.requires_grad or model.lora is None)
    saved += plain.optimiser + masters
    copies = 0 if options.sync_save else saved
    needed = chosen.peak + rounded + (copies if device.type == "cpu" else 0)
    result = {
        "parameters": _groups(model),
        "weights_bytes": plain.weights,
        "gradients_bytes": plain.gradients,
        "optimiser_bytes": plain.optimiser,
        "masters_bytes": rounded,
        "teacher_bytes": teacher,
        "activations_bytes": plain.activations,
        "activations_bytes_checkpointed": checkpointed.activations,
        "peak_bytes": plain.peak + rounded,
        "peak_bytes_checkpointed": checkpointed.peak + rounded,
        "device": str(device),
        "device_bytes": there,
        "fits": None if there is None else needed <= there,
        "dtype": dtype_name(dtype),
        "steps": steps,
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        "matmul_peak_flops": rate,
        "tokens_per_second_at_most": rate and rate / flops,
        "seconds_at_least": _seconds(options, steps * tokens, rate and rate / flops),
        "checkpoint_bytes": saved,
        "saving_bytes": copies,
    }
    if not options.json_output:
        _tell(result, options)
    return result


def _footprint(
    objective: Objective, model: GPT, batch: Batch, device: torch.device, dtype: torch.dtype
) -> Footprint:
    """Of two steps with up to two micro-batches each."""
    options = objective.options
    rounds = min(options.accumulate, 2)  # from the second one on there are gradients
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        without_values(model, device)
        weights = meter.held
        if objective.teacher is not None:
            without_values(objective.teacher, device)
        inputs = {
            name: torch.empty_like(torch.from_numpy(value), device=device)
            for name, value in batch.inputs.items()
        }
        seed = torch.zeros((), dtype=torch.int64, device=device) if model.drops else None
        optimiser = build_optimiser(model, options)
        trained = [p for p in model.parameters() if p.requires_grad]
        for _ in range(_STEPS):
            for _ in range(rounds):
                before = meter.held
                with precision(device, dtype):
                    loss = objective.loss(model, inputs, seed=seed, **objective.keywords())
                activations = meter.held - before
                loss.backward()
                del loss
            gradients = [p.grad for p in trained if p.grad is not None]
            clip_grads_with_norm_(trained, 1.0, gradient_norm(trained))
            optimiser.step()
            kept = bytes_of(gradients)
            del gradients
            optimiser.zero_grad(set_to_none=True)
        moments = bytes_of(optimiser_tensors(model, optimiser).values())
    return Footprint(weights, kept, moments, activations, meter.peak)


def _groups(model: GPT) -> dict[str, int]:
    """How many parameters there are, by what they are for."""
    groups = dict.fromkeys(("embeddings", "attention", "ffn", "norms", "adapter", "head"), 0)
    for name, parameter in model.named_parameters():
        groups[_group(name)] += parameter.numel()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**groups, "total": model.num_parameters(), "trained": trained}


def _group(name: str) -> str:
    if name.startswith(("wte.", "wpe.")):
        return "embeddings"
    if "_lora." in name:
        return "adapter"
    if "norm" in name:
        return "norms"
    for part in ("attn", "ffn"):
        if f".{part}." in name:
            return "attention" if part == "attn" else part
    return "head"


def _seconds(options: LoopOptions, tokens: int, rate: float | None) -> float | None:
    seconds = [tokens / rate] if rate else []
    seconds += [options.max_seconds] if options.max_seconds else []
    return min(seconds, default=None)


def _tell(result: dict[str, Any], options: LoopOptions) -> None:
    groups = dict(result["parameters"])
    total, trained = groups.pop("total"), groups.pop("trained")
    parts = ", ".join(f"{name} {count:,}" for name, count in groups.items() if count)
    chosen = "_checkpointed" if options.activation_checkpointing else ""
    other = "" if chosen else "_checkpointed"
    there, fits = result["device_bytes"], result["fits"]
    rate, seconds = result["tokens_per_second_at_most"], result["seconds_at_least"]
    with_other = f"with{'out' if chosen else ''} --activation-checkpointing"
    lines = {
        "parameters": f"{total:,} ({parts})",
        "trained": None if trained == total else f"{trained:,}",
        "weights": _size(result["weights_bytes"]),
        "gradients": _size(result["gradients_bytes"]),
        "optimiser": f"{_size(result['optimiser_bytes'])} ({options.optimiser})",
        "kept by --qat": _size(result["masters_bytes"]) if result["masters_bytes"] else None,
        "teacher": _size(result["teacher_bytes"]) if result["teacher_bytes"] else None,
        "activations": f"{_size(result['activations_bytes' + chosen])} a micro-batch"
        f" ({_size(result['activations_bytes' + other])} {with_other})",
        "peak": f"{_size(result['peak_bytes' + chosen])} of tensors"
        f" ({_size(result['peak_bytes' + other])} {with_other})",
        "device": f"{result['device']}, {result['dtype']}"
        + ("" if there is None else f", {_size(there)}: {'fits' if fits else 'does not fit'}"),
        "operations": f"{result['flops_per_token']:.3g} a token",
        "speed": None if rate is None else f"at most {rate:,.0f} tokens/s, at the"
        f" {result['matmul_peak_flops']:.3g} operations/s of a matrix product here",
        "time": None if seconds is None else f"at least {seconds:,.0f} s for"
        f" {result['steps']:,} steps of {result['tokens_per_step']:,} tokens",
        "checkpoint": _size(result["checkpoint_bytes"])
        + (", and as much host memory while it is written" if result["saving_bytes"] else ""),
    }  # fmt: skip
    for name, value in lines.items():
        if value is not None:
            say(f"{name:<15}{value}")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
