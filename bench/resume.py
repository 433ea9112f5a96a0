"""Exact resume: runs killed at chosen moments and resumed, bit for bit beside runs never killed.

python -P -m gptopt.bench.resume [--out bench/results/resume.json] [--tries N]

Every row is one kill -9: parameters, moments, generators, losses, counters and the position in the
data of the resumed run are compared with those of the straight one.
"""

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptopt.bench.machine import stamp
from gptopt.cli import in_one_line
from gptopt.log import say
from gptopt.manifest import read_json, write_json, write_text
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.folder import to_toml
from gptopt.training.metrics import read_metrics
from gptopt.verbs import VERBS

SENTENCES = (
    "the cat sat on the mat and looked at the dog. ",
    "a dog ran to the red door; the cat did not care! ",
    "who knows what the old dog saw behind that door? ",
)
_BLOCK, _BATCH, _ACCUMULATE, _STEPS = 8, 30, 2, 14
_MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": _BLOCK}
_OPTIONS: dict[str, Any] = {
    "steps": _STEPS, "batch_size": _BATCH, "accumulate": _ACCUMULATE, "warmup_steps": 2,
    "eval_every": 7, "eval_batches": 2, "checkpoint_every": 3, "log_every": 1, "seed": 5,
    "device": "cpu", "resume": True, "exact": True, "json": True,
}  # fmt: skip
_CHANGED_BY_VERB: dict[str, dict[str, Any]] = {
    "train": {"data": {"kind": "char"}},
    "finetune sft": {"init_from": "base"},
    "finetune classify": {"init_from": "base"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"model": {"dropout": 0.2}},
    "LoRA": {"lora": {"rank": 2, "dropout": 0.1}, "init_from": "base"},
    "masked LM": {"objective": "masked", "model": {"dropout": 0.1}},
    "QAT": {"qat": "q4", "model": {"dropout": 0.1}},
    "replies, packed": {"verb": "finetune sft", "dropout": 0.2},
    "labels": {"verb": "finetune classify", "dropout": 0.2},
    "DDP, two ranks": {"parallel": "ddp", "batch_size": _BATCH // 2, "model": {"dropout": 0.2}},
    "FSDP2, two ranks": {"parallel": "fsdp", "batch_size": _BATCH // 2, "model": {"dropout": 0.2}},
}
MOMENTS = ("mid-epoch", "mid-accumulation", "epoch boundary")
# What a clock says differs between any two runs.
_CLOCKS = {"seconds", "tokens_per_second", "mfu", "todo", "warm_end"}
_LEARNED = ("step", "loss", "lr", "grad_norm", "tokens", "skipped", "val_loss")
_TIMEOUT_S = 300


class Kill(NamedTuple):
    """When a run dies: so long after a micro-batch of a step has begun."""

    step: int
    micro: int
    delay_ms: float
    rank: int


def moment(kind: str, blocks: int, ranks: int, chance: random.Random) -> Kill:
    """A random kill of one kind, where an epoch has so many blocks."""
    per_step = _BATCH * _ACCUMULATE
    boundaries = [
        s for s in range(_STEPS) if s * per_step // blocks != (s + 1) * per_step // blocks
    ]
    rank = chance.randrange(ranks)
    if kind == "epoch boundary":
        step = chance.choice(boundaries)
        micro = int((step * per_step + _BATCH) // blocks == step * per_step // blocks)
        return Kill(step, micro, 0.0, rank)
    inside = [s for s in range(1, _STEPS) if s not in boundaries]
    if kind == "mid-accumulation":
        return Kill(chance.choice(inside), 1, 0.0, rank)
    return Kill(chance.choice(inside), 0, chance.uniform(0, 20), rank)


class Matrix:
    """Runs in one folder; the straight run of a variant is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = "".join(SENTENCES[i * i % 3] for i in range(60))
        self._text, self._examples = folder / "text.txt", folder / "examples.jsonl"
        write_text(self._text, text)
        write_text(self._examples, "".join(map(_example, text.split())))
        self._straight: dict[str, Path] = {}

    def row(self, variant: str, kind: str, seed: int) -> dict[str, Any]:
        """Kill a run of a variant at a random moment of a kind, resume it, and compare."""
        straight = self.straight(variant)
        out = self.folder / f"{variant}-{kind}-{seed}".replace(" ", "-").replace(",", "")
        ranks = 2 if "parallel" in VARIANTS[variant] else 1
        kill = moment(kind, _sequences(straight), ranks, random.Random(seed))  # noqa: S311 - no secret
        killed = self._run(variant, out, kill)
        if killed == 0:
            raise RuntimeError(f"{variant}, {kind}: the run ended before it was killed at {kill}")
        lines = read_metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
        if self._run(variant, out) != 0:
            raise RuntimeError(f"{variant}, {kind}: killed at {kill}, the run does not resume")
        differs = list(differences(straight, out))
        result = read_json(out / "result.json")
        return {
            **_named(variant, kind, kill),
            "lines_at_kill": len(lines),
            "resumed_from": result["resumed_from"],
            "equal": not differs,
            "differs": differs,
        }

    def straight(self, variant: str) -> Path:
        """The run that nobody killed."""
        if variant not in self._straight:
            out = self.folder / f"{variant} straight".replace(" ", "-").replace(",", "")
            if self._run(variant, out) != 0:
                raise RuntimeError(f"{variant}: the run that nobody killed failed")
            self._straight[variant] = out
        return self._straight[variant]

    def _run(self, variant: str, out: Path, kill: Kill | None = None) -> int:
        changes = dict(VARIANTS[variant])
        verb = changes.pop("verb", "train")
        values = _OPTIONS | _CHANGED_BY_VERB[verb] | changes | {"out": str(out)}
        values["inputs"] = [str(self._text if verb == "train" else self._examples)]
        if "init_from" in values:
            values["init_from"] = str(self._base())
        else:
            values["model"] = _MODEL | changes.get("model", {})
        return _train(verb, values, 2 if "parallel" in changes else 1, kill)

    def _base(self) -> Path:
        base = self.folder / "base"
        values = _OPTIONS | _CHANGED_BY_VERB["train"] | {"steps": 2, "model": _MODEL}
        values |= {"inputs": [str(self._text)], "out": str(base)}
        if not base.exists() and _train("train", values, 1, None) != 0:
            raise RuntimeError("the run that makes the model to start from failed")
        return base


def _example(word: str) -> str:
    """One word, to be spelled to its end or to be called long or short."""
    label = "long" if len(word) > 3 else "short"
    told = {"prompt": word[0], "completion": word[1:] or ".", "text": word, "label": label}
    return json.dumps(told) + "\n"


def _sequences(run: Path) -> int:
    """How many sequences an epoch of a run has."""
    result = read_json(run / "result.json")
    if "examples" in result:
        return int(result.get("blocks", result["examples"]))
    shards = read_json(run / "data" / "dataset.json")["splits"]["train"]
    return int(sum(shard["tokens"] for shard in shards) - 1) // _BLOCK


def _train(verb: str, values: dict[str, Any], ranks: int, kill: Kill | None) -> int:
    options, out = VERBS[verb].options_class.model_validate(values), Path(values["out"])
    if kill is None and ranks == 1:
        module, _, name = VERBS[verb].function.partition(":")
        getattr(importlib.import_module(module), name)(options)
        return 0
    config = out.with_name(f"{out.name}.toml")
    write_text(config, to_toml(options.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    never = Kill(-1, 0, 0.0, 0)
    command = [
        sys.executable, "-P", "-m", "gptopt.bench.dying", json.dumps((kill or never)._asdict()),
        *verb.split(), "--config", str(config),
    ]  # fmt: skip
    if ranks > 1:
        launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--no-python"]
        command = [*launcher, "--standalone", "--nproc-per-node", str(ranks), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with out.with_name(f"{out.name}.log").open("a") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, timeout=_TIMEOUT_S, check=False, env=environment
        )
    return done.returncode


def differences(left: Path, right: Path) -> Iterator[str]:
    """What two runs' last checkpoints and losses do not have in common, bit for bit."""
    a, b = (Checkpoints(run).pointed("latest") for run in (left, right))
    if a is None or b is None or a.name != b.name:
        yield f"last checkpoint: {a and a.name}, {b and b.name}"
        return
    names = {path.name for folder in (a, b) for path in folder.glob("*.safetensors")}
    for name in sorted(names):
        files = [folder / name for folder in (a, b)]
        if not all(file.is_file() for file in files) or len({f.read_bytes() for f in files}) > 1:
            yield name
    states = [read_json(folder / "state.json") for folder in (a, b)]
    for key in ("random", "fixed"):
        if states[0][key] != states[1][key]:
            yield key
    trained = [state["train"] for state in states]
    for key in sorted(trained[0].keys() - _CLOCKS):
        if trained[0][key] != trained[1][key]:
            yield key
    lines = [[[line.get(key) for key in _LEARNED] for line in read_metrics(run / "metrics.jsonl")]
             for run in (left, right)]  # fmt: skip
    if lines[0] != lines[1]:
        yield "metrics.jsonl"


def _named(variant: str, kind: str, kill: Kill) -> dict[str, Any]:
    return {"variant": variant, "moment": kind, "killed": kill._asdict()}


def main() -> int:
    """Make the whole table; 1 where a row is not equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/resume.json"))
    parser.add_argument("--tries", type=int, default=3, help="kills of each kind and variant")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        for variant in VARIANTS:
            for kind in MOMENTS:
                for seed in range(chosen.tries):
                    rows.append(matrix.row(variant, kind, seed))
                    say(_shown(rows[-1]))
    write_json(chosen.out, {"rows": rows, "machine": stamp()})
    return int(not all(row["equal"] for row in rows))


def _shown(row: dict[str, Any]) -> str:
    killed = row["killed"]
    verdict = "equal" if row["equal"] else f"DIFFERS: {', '.join(row['differs'])}"
    when = f"step {killed['step']}, micro-batch {killed['micro']}, rank {killed['rank']}"
    return f"{row['variant']:<18}{row['moment']:<18}{when:<34}{verdict}"


if __name__ == "__main__":
    sys.exit(in_one_line(main))
