"""`gptopt bench quality`: how much of a trained model is left in each file, beside llama.cpp's.

Every file is measured on the same held-out text: the presets of gptopt and its mixes as
onnxruntime runs them, llama.cpp's formats with the weights that llama.cpp rounded put back into the
PyTorch model (see peers/gguf_weights.py). Random weights would say nothing here.
"""

import json
import logging
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from gptopt.bench import machine
from gptopt.checkpoint import LoadedModel, load_model
from gptopt.config_machine import QualityOptions
from gptopt.errors import UserError
from gptopt.export.budget import parse_budget
from gptopt.export.calibration import Calibration
from gptopt.export.package import Plan, export_model
from gptopt.export.quality import HeldOut, Quality
from gptopt.export.texts import MIN_CALIBRATION, MIN_HELD_OUT, read_ids
from gptopt.log import say
from gptopt.precisions import PRECISIONS, Allowed, find_precisions

logger = logging.getLogger(__name__)

Row = dict[str, Any]

PEER_FORMATS = ("q8_0", "q4_k_m", "q4_0")
_WINDOWS = 24
_PEER = "llamacpp"
_SCRIPT = Path(__file__).parent / "peers" / "gguf_weights.py"


def quality(options: QualityOptions) -> dict[str, Any]:
    """Measure, and write quality.json and quality.svg.

    Returns:
        rows: one for each file of each model; files: what was written.

    Raises:
        UserError: no such model, text or environment.
        CheckFailed: a file does not say what the model says, or loses more than its preset may.
    """
    precisions = find_precisions(options.precision)
    budgets = [parse_budget(text) for text in options.budget]
    python = _python(options.peer_python)
    rows: list[Row] = []
    for name in options.models:
        loaded = load_model(name, checkpoint=options.checkpoint, kernels="reference")
        model = loaded.model
        held_out = HeldOut(
            model, read_ids("--held-out", options.held_out, loaded, MIN_HELD_OUT), windows=_WINDOWS
        )
        calibration = Calibration(
            model, read_ids("--calibration", options.calibration, loaded, MIN_CALIBRATION)
        )
        shape = {key: getattr(model.config, key) for key in ("n_layer", "n_embd", "vocab_size")}
        about = {"model": Path(name).name, "parameters": model.num_parameters(), **shape}
        with tempfile.TemporaryDirectory() as folder:
            plans = [("", Plan(precisions, calibration, held_out))]
            plans += [
                (f" {budget}", Plan([PRECISIONS["q4"]], calibration, held_out, budget=budget))
                for budget in budgets
            ]
            for number, (label, plan) in enumerate(plans):
                out = Path(folder) / str(number)
                report = export_model(model, loaded.tokenizer, out, plan=plan)
                for variant in report["variants"].values():
                    files = out.glob(f"{variant['file']}*")
                    size = sum(path.stat().st_size for path in files)
                    rows.append(
                        _row(about, f"gptopt {_name(variant)}{label}", size, variant["quality"])
                    )
            if python is not None:
                rows += _peers(python, loaded, held_out, Path(folder), about)
    out = Path(options.out)
    machine.write(out / "quality.json", {"rows": rows, "peer_formats": PEER_FORMATS})
    _draw(out / "quality.svg", rows)
    if not options.json_output:
        say(_table(rows))
    return {"rows": rows, "files": [str(out / "quality.json"), str(out / "quality.svg")]}


def _name(variant: Row) -> str:
    """The precision of a variant, by its file."""
    stem = Path(variant["file"]).stem.removeprefix("model")
    return next(each.name for each in PRECISIONS.values() if each.suffix == stem)


def _row(about: Row, contender: str, size: int, measured: Row, **more: Any) -> Row:
    keys = ("positions", "mean_kl", "max_kl", "agreement", "perplexity", "increase",
            "standard_error", "model_perplexity")  # fmt: skip
    row = {**about, "contender": contender, "bytes": size, **{key: measured[key] for key in keys}}
    return row | more


def _python(given: str | None) -> str | None:
    if given is None:
        logger.warning("llama.cpp takes no part; give --peer-python llamacpp=PYTHON")
        return None
    name, _, python = given.partition("=")
    if name != _PEER or not Path(python).is_file():
        raise UserError(
            f"--peer-python {given}: expected {_PEER}=PYTHON, the Python of an environment with "
            f"llama-cpp-python and gguf"
        )
    return python


def _peers(
    python: str, loaded: LoadedModel, held_out: HeldOut, folder: Path, about: Row
) -> list[Row]:
    """llama.cpp's formats; a line of the log says why one is missing."""
    rows = []
    for variant in PEER_FORMATS:
        out = folder / f"rounded-{variant}"
        done = subprocess.run(
            [python, "-P", str(_SCRIPT), str(loaded.folder), str(out), variant],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            logger.warning("llama.cpp %s takes no part: %s", variant, lines[-1])
            continue
        told = json.loads(done.stdout.strip().splitlines()[-1])
        measured = _with_weights_of(out, held_out).as_dict()
        rows.append(
            _row(about, f"llama.cpp {variant}", told["bytes"], measured, types=told["types"],
                 version=told["version"])
        )  # fmt: skip
    return rows


def _with_weights_of(folder: Path, held_out: HeldOut) -> Quality:
    model = load_model(str(folder), kernels="reference").model

    def run(ids: Any) -> torch.Tensor:
        logits: torch.Tensor = model(torch.from_numpy(ids)).logits[0]
        return logits

    return held_out.compare(run, Allowed())


def _table(rows: list[Row]) -> str:
    lines = [f"{'file':<32}{'bytes':>12}{'KL':>10}{'perplexity':>20}{'same token':>12}"]
    for row in rows:
        perplexity = f"{row['perplexity']:.4g} ({row['increase']:+.2%})"
        lines.append(
            f"{row['contender']:<32}{row['bytes']:>12,}{row['mean_kl']:>10.1e}{perplexity:>20}"
            f"{row['agreement']:>12.1%}"
        )
    return "\n".join(lines)


def _draw(path: Path, rows: list[Row]) -> None:
    """Bytes against divergence: down and to the left is better."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for row in rows:
            if row["model"] != model or row["mean_kl"] < 1e-7:
                continue
            ours = row["contender"].startswith("gptopt")
            color = "#0b7a75" if ours else "#9a6b1f"
            axis.plot(row["bytes"] / 1e6, row["mean_kl"], "o", color=color)
            label = row["contender"].removeprefix("gptopt ")
            axis.annotate(label, (row["bytes"] / 1e6, row["mean_kl"]), fontsize=8, color=color,
                          xytext=(5, 4), textcoords="offset points")  # fmt: skip
        axis.set_yscale("log")
        axis.set_xlabel("MB of all weights")
        axis.set_ylabel("KL divergence from float32, nats per token")
        axis.set_title(f"{model}, {rows[0]['parameters'] / 1e6:.1f}M parameters", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
