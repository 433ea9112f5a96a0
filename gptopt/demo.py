"""`gptopt demo`: text in, a GPT out, a proven ONNX folder that runs without PyTorch.

It is nothing but the commands it prints, one after the other, so each can be repeated by hand. The
text is the English documentation that every CPython carries, so nothing is downloaded.
"""

import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gptopt.config import DemoOptions
from gptopt.errors import Interrupted, UserError
from gptopt.log import say
from gptopt.manifest import read_json, write_json, write_text

logger = logging.getLogger(__name__)

PROMPT = "The following"
MARKER = "demo.json"
VOCAB_SIZE = 1024
NEW_TOKENS = 64


def demo(options: DemoOptions) -> dict[str, Any]:
    """Run the whole road and show one table.

    Returns:
        The table's figures (see README, "JSON output"), `commands` and `seconds`.
    """
    started = time.monotonic()
    out = _fresh_folder(Path(options.out), options.force)
    steps = _Steps(out)
    text, data, run, edge = (str(out / name) for name in ("text", "data", "run", "edge"))
    documents = _write_text(Path(text))
    say(f"text         {documents} documents of Python's own documentation in {text}")
    steps.run("tokenize", text, "--out", data, "--vocab-size", str(VOCAB_SIZE))
    trained = steps.run(
        "train", data, "--out", run, "--preset", "gpt-tiny", "--max-seconds",
        f"{options.seconds:g}", "--steps", "100000", "--batch-size", "8", "--lr", "3e-3",
        "--warmup-steps", "50", "--eval-every", "100", "--checkpoint-every", "0",
    )  # fmt: skip
    sampled = steps.run("generate", run, "--prompt", PROMPT, "--temperature", "0.8", "--seed", "1")
    say(f"sample       {PROMPT}{sampled['text']}".replace("\n", "\n             "))
    exported = steps.run("export", run, "--out", edge)
    greedy = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", str(NEW_TOKENS)]
    in_torch = steps.run("generate", run, *greedy)
    at_edge = steps.run("run", edge, *greedy)
    scored = [steps.run("evaluate", model, "--data", data) for model in (run, edge)]
    figures = _figures(trained, exported, in_torch, at_edge, scored)
    figures |= {"commands": steps.lines, "seconds": time.monotonic() - started}
    write_json(out / MARKER, figures)
    _show(figures, out)
    return figures


class _Steps:
    """Runs gptopt commands in processes of their own and keeps their command lines."""

    def __init__(self, out: Path) -> None:
        self.lines: list[str] = []
        self._script = out / "commands.sh"

    def run(self, *arguments: str) -> dict[str, Any]:
        line = shlex.join(["gptopt", *arguments])
        say(f"\n$ {line}")
        self.lines.append(line)
        write_text(self._script, "\n".join(["set -e", *self.lines]) + "\n")
        # -P keeps the working folder off the import path: it may hold a `kernels` folder.
        command = [sys.executable, "-P", "-m", "gptopt", *arguments, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode in (130, 143):
            raise Interrupted(f"the demo was interrupted in: {line}", done.returncode)
        if done.returncode:
            raise UserError(f"the demo stopped: {line} ended with exit code {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def _fresh_folder(out: Path, force: bool) -> Path:
    """An empty folder; an old one is replaced only with force, and only if a demo wrote it."""
    if out.exists():
        if not force:
            raise UserError(f"{out}: exists already; choose another --out, or add --force")
        if not (out / MARKER).is_file() and any(out.iterdir()):
            raise UserError(f"{out}: was not written by gptopt demo; choose another --out")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None
    write_json(out / MARKER, {"complete": False})
    return out


def _write_text(folder: Path) -> int:
    from pydoc_data import topics

    folder.mkdir()
    for name, text in sorted(topics.topics.items()):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return len(topics.topics)


def _figures(
    trained: dict[str, Any],
    exported: dict[str, Any],
    in_torch: dict[str, Any],
    at_edge: dict[str, Any],
    scored: list[dict[str, Any]],
) -> dict[str, Any]:
    pairs = zip(in_torch["tokens"], at_edge["tokens"], strict=False)
    agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    expected = len(in_torch["tokens"])
    report = read_json(Path(exported["out"]) / "report.json")
    return {
        "parameters": trained["parameters"],
        "train_loss": trained["train_loss"],
        "val_loss": scored[0]["val_loss"],
        "perplexity_torch": scored[0]["perplexity"],
        "perplexity_onnxruntime": scored[1]["perplexity"],
        "max_logit_error": report["max_abs_error"],
        "logit_error_budget": report["budget"],
        "greedy_tokens": expected,
        "greedy_tokens_agreeing": expected if agreeing is None else agreeing,
        "tokens_per_second_torch": in_torch["tokens_per_second"],
        "tokens_per_second_onnxruntime": at_edge["tokens_per_second"],
        "files": report["files"],
    }


def _show(figures: dict[str, Any], out: Path) -> None:
    agreeing = f"{figures['greedy_tokens_agreeing']} of {figures['greedy_tokens']}"
    error = f"{figures['max_logit_error']:.1e} (budget {figures['logit_error_budget']:.1e})"
    rows = [
        ("", "PyTorch", "onnxruntime"),
        ("perplexity", f"{figures['perplexity_torch']:.3f}",
         f"{figures['perplexity_onnxruntime']:.3f}"),
        ("tokens/s, greedy", f"{figures['tokens_per_second_torch']:.0f}",
         f"{figures['tokens_per_second_onnxruntime']:.0f}"),
        ("parameters", f"{figures['parameters']:,}", ""),
        ("loss, train / val", f"{figures['train_loss']:.3f} / {figures['val_loss']:.3f}", ""),
        ("largest logit error", "", error),
        ("greedy tokens agreeing", "", agreeing),
    ]  # fmt: skip
    rows += [(f"edge/{name}", "", f"{size:,} bytes") for name, size in figures["files"].items()]
    say()
    for name, left, right in rows:
        say(f"{name:<34}{left:>18}  {right:>30}")
    say(f"\nloss curve   {out / 'run' / 'loss.png'}")
    say(f"commands     {out / 'commands.sh'} (each can be run by hand)")
    say(f"wall time    {figures['seconds']:.0f} s")
