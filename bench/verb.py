"""`gptopt bench WHAT`: resolve the device, measure its limits, run one bench, write the report."""

import logging
import platform
from pathlib import Path
from typing import Any

import torch

from gptopt.bench import contenders, generation, training
from gptopt.bench.cases import OPERATORS, cases
from gptopt.bench.kernels import bench_kernels
from gptopt.bench.limits import Limits, measure_limits
from gptopt.bench.records import Recorder
from gptopt.bench.report import PAGE, SUMMARY, write_report
from gptopt.bench.timing import TimeBudget
from gptopt.config_machine import BenchOptions
from gptopt.errors import UserError
from gptopt.log import say
from gptopt.training.hardware import resolve_device

logger = logging.getLogger(__name__)

MACHINERY = (
    "measured on a CPU, on tiny shapes: this shows that the bench works and says nothing about"
    " the kernels"
)
_CONTENDERS = {
    "kernels": contenders.NAMES,
    "training": training.NAMES,
    "generate": generation.NAMES,
}
_BENCHES = {
    "kernels": bench_kernels,
    "training": training.bench_training,
    "generate": generation.bench_generation,
}


def bench(options: BenchOptions) -> dict[str, Any]:
    """Run one bench and write its rows and the report of all rows in the folder.

    Returns:
        what, device, machinery (the note on CPU figures, or None), rows (number), files, targets.

    Raises:
        UserError: options or folder do not fit.
    """
    device = _exact(resolve_device(options.device))
    _refuse(options, device)
    budget = TimeBudget(options.minutes)
    if device.type == "cpu":
        logger.warning("%s", MACHINERY)
    out = Path(options.out)
    limits = _limits(device)
    with Recorder(out, options.what, device, limits, append=options.append) as recorder:
        try:
            _BENCHES[options.what](options, device, limits, recorder, budget)
        finally:
            targets = write_report(out)  # also of what an interruption left
    result = {
        "what": options.what,
        "device": str(device),
        "machinery": MACHINERY if device.type == "cpu" else None,
        "rows": recorder.rows,
        "files": [str(recorder.path), str(out / PAGE), str(out / SUMMARY)],
        "targets": targets,
    }
    if not options.json_output:
        say(f"{recorder.rows} rows in {recorder.path}")
        say(f"report: {out / PAGE}, in short: {out / SUMMARY}")
        if device.type == "cpu":
            say(MACHINERY)
    return result


def _exact(device: torch.device) -> torch.device:
    """With its number: torch.cuda takes no "cuda" alone where a device has to be chosen."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _refuse(options: BenchOptions, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: the bench measures cpu or cuda; choose one of them")
    if unknown := [name for name in options.only if name.partition(":")[0] not in OPERATORS]:
        raise UserError(
            f"--only {unknown[0]}: not an operator; choose from {', '.join(OPERATORS)}, or one"
            f" with a word of its cases, as in attention:d64"
        )
    known = _CONTENDERS[options.what]
    if strangers := [name for name in options.contenders if name not in known]:
        raise UserError(
            f"--contenders {strangers[0]}: unknown to bench {options.what}; choose from"
            f" {', '.join(known)}"
        )
    if options.what == "kernels" and not cases(device, quick=options.quick, only=options.only):
        raise UserError(f"--only {' '.join(options.only)}: no such case here; leave the word out")
    if options.only and options.what != "kernels":
        raise UserError("--only: names an operator of gptopt bench kernels; leave it out here")
    if options.nanogpt is not None:
        if options.what != "training":
            raise UserError("--nanogpt: belongs to gptopt bench training; leave it out here")
        if not (Path(options.nanogpt) / "model.py").is_file():
            raise UserError(f"--nanogpt {options.nanogpt}: has no model.py; give a checkout")


def _limits(device: torch.device) -> Limits:
    narrow = [torch.bfloat16] if device.type == "cuda" else []
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limits = measure_limits(device, [torch.float32, *narrow])
    shown = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in limits.flops_per_s.items())
    logger.info(
        "%s: copies %.4g GB/s, multiplies at %s TFLOP/s",
        device if device.type == "cuda" else platform.machine(), limits.bytes_per_s / 1e9, shown,
    )  # fmt: skip
    return limits
