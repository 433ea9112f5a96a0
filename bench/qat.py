"""What quantisation-aware fine-tuning is worth: a trained model, fine-tuned with --qat and without.

python -P -m gptopt.bench.qat MODEL DATA --held-out TEXT --calibration TEXT [--out qat.json]

All take the same steps over the same sequences, so nobody gets credit for training longer. Every
file is measured on the held-out text beside one PyTorch model, that of the steps without --qat in
float32: `increase` is what a file's perplexity is above it, rounding and all.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptopt.bench import machine
from gptopt.checkpoint import load_model
from gptopt.cli import in_one_line
from gptopt.config import TrainOptions
from gptopt.export.calibration import Calibration
from gptopt.export.package import Plan, export_model
from gptopt.export.quality import HeldOut
from gptopt.export.texts import MIN_CALIBRATION, MIN_HELD_OUT, read_ids
from gptopt.log import say
from gptopt.precisions import PRECISIONS, Allowed
from gptopt.runtime.variants import EdgeFile
from gptopt.training import train

_WINDOWS = 24
_FIGURES = ("positions", "perplexity", "model_perplexity", "increase", "standard_error", "mean_kl",
            "agreement")  # fmt: skip
_STEPS = {"batch_size": 4, "warmup_steps": 5, "min_lr": 0.0, "eval_every": 0, "seed": 1}


def main() -> None:
    """Run from the command line."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as name:
        runs = {qat: _fine_tuned(given, Path(name), qat) for qat in (None, *given.precision)}
        plain = load_model(runs[None], kernels="reference")
        ids = read_ids("--held-out", given.held_out, plain, MIN_HELD_OUT)
        held_out = HeldOut(plain.model, ids, windows=_WINDOWS)
        rows = [
            _row(runs[qat], precision, qat, text, held_out)
            for precision in given.precision
            for qat in (None, precision)
            for text in (None, given.calibration)
        ]
        parameters = plain.model.num_parameters()
    result = {
        "command": machine.command_line("python -P -m gptopt.bench.qat"),
        "parameters": parameters,
        "options": {"steps": given.steps, "lr": given.lr, **_STEPS},
        "rows": rows,
    }
    machine.write(Path(given.out), result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="--qat beside the same steps without it")
    parser.add_argument("model", help="trained model folder")
    parser.add_argument("data", help="data folder to fine-tune on, of the model's tokenizer")
    parser.add_argument("--held-out", required=True, help="text to measure on")
    parser.add_argument("--calibration", required=True, help="text to calibrate exports on")
    parser.add_argument("--precision", nargs="+", default=["q4", "q2"], choices=PRECISIONS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", default="bench/results/qat.json", help="file to write")
    return parser.parse_args()


def _fine_tuned(given: argparse.Namespace, folder: Path, qat: str | None) -> str:
    """The run folder of the model after its steps."""
    options: dict[str, Any] = {
        "inputs": [given.data], "init_from": given.model, "out": str(folder / (qat or "plain")),
        "steps": given.steps, "lr": given.lr, "qat": qat, "checkpoint_every": 0, "json": True,
        "eval_batches": 4, **_STEPS,
    }  # fmt: skip
    out: str = train(TrainOptions.model_validate(options))["out"]
    return out


def _row(
    run: str, precision: str, qat: str | None, calibration: str | None, held_out: HeldOut
) -> dict[str, Any]:
    """What one export of a run loses."""
    loaded = load_model(run, kernels="reference")
    calibrated = None
    if calibration is not None:
        ids = read_ids("--calibration", calibration, loaded, MIN_CALIBRATION)
        calibrated = Calibration(loaded.model, ids)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "edge"
        plan = Plan([PRECISIONS[precision]], calibrated)
        facts = export_model(loaded.model, loaded.tokenizer, out, plan=plan)["variants"][precision]
        file = EdgeFile.model_validate(facts)
        measured = held_out.measure(out / file.file, file, Allowed()).as_dict()
    row = {"precision": precision, "qat": qat is not None, "calibrated": calibration is not None}
    row |= {key: measured[key] for key in _FIGURES}
    say(", ".join(f"{key} {value}" for key, value in row.items()))
    return row


if __name__ == "__main__":
    sys.exit(in_one_line(main))
