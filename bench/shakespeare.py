"""Tiny Shakespeare by characters beside nanoGPT: loss on the whole validation split, step time.

    python -P -m gptopt.bench.shakespeare --text tinyshakespeare.txt --nanogpt CHECKOUT --out FILE

nanoGPT's published CPU setting: 4 layers, 4 heads, 128 channels, block 64, batch 12, 2000 steps.
Every hyperparameter is given as a flag. Both losses are means over the whole validation split in
windows of 64 characters; step times are medians of alternating runs of the two programs. No seeds
leaves the losses out, 0 rounds the step times.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptopt.bench.machine import write
from gptopt.cli import in_one_line

STEPS = 2000
TRAIN_FLAGS = [
    "--model.n-layer", "4", "--model.n-head", "4", "--model.n-embd", "128",
    "--model.block-size", "64",
    "--model.no-bias", "--model.activation", "gelu", "--model.dropout", "0", "--data.kind", "char",
    "--data.val-fraction", "0.1", "--batch-size", "12", "--lr", "1e-3", "--min-lr", "1e-4",
    "--warmup-steps", "100", "--schedule", "cosine", "--beta1", "0.9", "--beta2", "0.99",
    "--weight-decay", "0.1", "--grad-clip", "1",
]  # fmt: skip
NANOGPT_FLAGS = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
    "--lr_decay_iters=2000", "--dropout=0.0", "--always_save_checkpoint=True",
]  # fmt: skip
# Runs inside the peer's own folder, with its own model class, on the checkpoint it just wrote.
NANOGPT_LOSS = """
import sys, numpy as np, torch
from model import GPT, GPTConfig
state = torch.load(sys.argv[1] + "/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**state["model_args"]))
model.load_state_dict(state["model"])
model.eval()
ids = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
total = count = 0
with torch.no_grad():
    for start in range(0, len(ids) - 1, 64):
        window = ids[start : start + 65]
        _, loss = model(window[None, :-1], window[None, 1:])
        total, count = total + loss.item() * (len(window) - 1), count + len(window) - 1
print("loss", total / count, "tokens", count, "steps", state["iter_num"])
"""


def main() -> None:
    """Run both programs and write one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1337, 1338, 1339])
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds of step timing")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        peer = _prepare_peer(options.nanogpt, options.text, Path(scratch))
        result: dict[str, Any] = {"benchmark": "tiny Shakespeare by characters", "steps": STEPS}
        if options.seeds:
            result |= _losses(options.text, peer, Path(scratch), options.seeds)
        if options.rounds:
            result["step_ms"] = _step_ms(options.text, peer, Path(scratch), options.rounds)
        write(options.out, result)
    print(json.dumps(result, indent=2))  # noqa: T201 - this program's result


def _gptopt(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "gptopt", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _losses(text: Path, peer: Path | None, scratch: Path, seeds: list[int]) -> dict[str, Any]:
    losses = {"gptopt": [_loss(text, seed, scratch) for seed in seeds]}
    if peer:
        losses["nanoGPT"] = [_peer_loss(peer, seed) for seed in seeds]
    median = {name: statistics.median(values) for name, values in losses.items()}
    return {"seeds": seeds, "loss": losses, "loss_median": median}


def _loss(text: Path, seed: int, scratch: Path) -> float:
    run = scratch / f"gptopt-{seed}"
    _gptopt(
        "train", str(text), "--out", str(run), *TRAIN_FLAGS, "--steps", str(STEPS),
        "--seed", str(seed), "--eval-every", "250", "--eval-batches", "20",
    )  # fmt: skip
    scored = _gptopt("evaluate", str(run), "--checkpoint", "last", "--data", str(run / "data"))
    return float(scored["val_loss"])


def _prepare_peer(checkout: Path | None, text: Path, scratch: Path) -> Path | None:
    if checkout is None:
        return None
    peer = scratch / "nanoGPT"
    shutil.copytree(checkout, peer, ignore=shutil.ignore_patterns(".git", "out*"))
    data = peer / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")  # its script downloads only what is missing
    script = (data / "prepare.py").read_text(encoding="utf-8").replace("import requests", "")
    (data / "prepare.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    return peer


def _peer_train(peer: Path, steps: int, seed: int, *flags: str) -> str:
    script = (peer / "train.py").read_text(encoding="utf-8")
    seeded = script.replace("manual_seed(1337 + seed_offset)", f"manual_seed({seed} + seed_offset)")
    (peer / "seeded.py").write_text(seeded, encoding="utf-8")
    command = [sys.executable, "seeded.py", *NANOGPT_FLAGS, f"--max_iters={steps}", *flags]
    done = subprocess.run(command, cwd=peer, check=True, capture_output=True, text=True)
    return done.stdout


def _peer_loss(peer: Path, seed: int) -> float:
    _peer_train(peer, STEPS, seed, f"--out_dir=out-{seed}", "--log_interval=500")
    done = subprocess.run(
        [sys.executable, "-c", NANOGPT_LOSS, f"out-{seed}"],
        cwd=peer, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout.split()[1])


def _step_ms(text: Path, peer: Path | None, scratch: Path, rounds: int) -> dict[str, Any]:
    """Median step time of each program: runs of 200 steps in turn, the first 50 left out."""
    taken: dict[str, list[float]] = {"gptopt": [], "nanoGPT": []} if peer else {"gptopt": []}
    for turn in range(rounds):
        run = scratch / f"timing-{turn}"
        _gptopt(
            "train", str(text), "--out", str(run), *TRAIN_FLAGS, "--steps", "200",
            "--log-every", "1", "--eval-every", "0", "--checkpoint-every", "0",
        )  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
        steps = [line["step_ms"] for line in lines if "step_ms" in line]
        taken["gptopt"].append(statistics.median(steps[50:]))
        if peer:
            printed = _peer_train(peer, 200, 1337, "--log_interval=1", "--eval_interval=1000")
            steps = [float(found) for found in re.findall(r"time ([\d.]+)ms", printed)]
            taken["nanoGPT"].append(statistics.median(steps[50:]))
    result: dict[str, Any] = {name: statistics.median(values) for name, values in taken.items()}
    if peer:
        pairs = zip(taken["gptopt"], taken["nanoGPT"], strict=True)
        result["ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return {**result, "rounds": taken}


if __name__ == "__main__":
    sys.exit(in_one_line(main))
