"""GPT-2 124M in fp32 on a CPU: export and proof, then decoding beside transformers in torch eager.

    python -P -m gptopt.bench.decode --out FILE

The weights are random (nothing is downloaded), so the figures are about speed, memory and size. The
two contenders live in processes of their own and take turns; each turn continues the same prompt
greedily, one sequence, and reports tokens per second without the first token.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gptopt.bench.machine import write

CONTENDERS = ("gptopt.runtime", "transformers")
PROMPT_TOKENS = 32


def main() -> None:
    """Measure and write one JSON file; with --worker, be one contender."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker, options.folder, options.new_tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model, edge = Path(scratch) / "gpt2", Path(scratch) / "edge"
        parameter_bytes = make_gpt2(model)
        result: dict[str, Any] = {"benchmark": "GPT-2 124M, fp32, random weights"}
        result["export"] = _export(model, edge, parameter_bytes)
        folders = {"gptopt.runtime": edge, "transformers": model}
        result["decode"] = _decode(folders, options.rounds, options.new_tokens)
    if options.out:
        write(options.out, result)
    print(json.dumps(result, indent=2))  # noqa: T201 - this program's result


def make_gpt2(folder: Path) -> int:
    """Write a random GPT-2 124M as transformers does; its parameters' bytes, tied ones once."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from gptopt.tokenizer import Tokenizer

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)  # zero biases would hide a lost one
    model.save_pretrained(folder)
    Tokenizer.train(["the quick brown fox"], kind="bpe", vocab_size=300).save(folder)
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def _export(model: Path, edge: Path, parameter_bytes: int) -> dict[str, Any]:
    """Export and prove in a process of its own: seconds, peak memory, size of the ONNX files."""
    command = [sys.executable, "-P", "-m", "gptopt", "export", str(model), "--out", str(edge)]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    report = json.loads((edge / "report.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in (edge / "onnx").iterdir())
    return {
        "seconds": seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "onnx_bytes": size,
        "parameter_bytes": parameter_bytes,
        "size_ratio": size / parameter_bytes,
        "max_abs_error": report["max_abs_error"],
        "budget": report["budget"],
    }


def _decode(folders: dict[str, Path], rounds: int, new_tokens: int) -> dict[str, Any]:
    workers = {name: _start(name, folder, new_tokens) for name, folder in folders.items()}
    taken: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds + 1):
        for name in sorted(workers, reverse=bool(turn % 2)):
            rate = _ask(workers[name])
            if turn:  # the first turn warms up
                taken[name].append(rate)
    for worker in workers.values():
        worker.communicate("")
    ours, theirs = (taken[name] for name in CONTENDERS)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "tokens_per_second": {name: statistics.median(rates) for name, rates in taken.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "new_tokens": new_tokens,
        "rounds": taken,
    }


def _start(name: str, folder: Path, new_tokens: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-m", "gptopt.bench.decode", "--worker", name]
    command += ["--folder", str(folder), "--new-tokens", str(new_tokens)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(worker: "subprocess.Popen[str]") -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def _work(name: str, folder: Path, new_tokens: int) -> None:
    prompt = [(7919 * i) % 50000 for i in range(1, PROMPT_TOKENS + 1)]
    step = _edge(folder) if name == "gptopt.runtime" else _transformers(folder)
    for _ in sys.stdin:
        started = step(prompt, 1)
        finished = step(prompt, new_tokens)
        rate = (new_tokens - 1) / (finished - started)
        print(rate, flush=True)  # noqa: T201 - the parent reads it


def _edge(folder: Path) -> Any:
    from gptopt.config import SamplingOptions
    from gptopt.runtime import EdgeModel

    model = EdgeModel(folder)

    def step(prompt: list[int], new_tokens: int) -> float:
        started = time.perf_counter()
        made = model.generate([prompt], SamplingOptions(temperature=0, max_new_tokens=new_tokens))
        assert len(made[0]) == new_tokens  # an early end would be a false speed
        return time.perf_counter() - started

    return step


def _transformers(folder: Path) -> Any:
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()

    def step(prompt: list[int], new_tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, pad_token_id=0, attention_mask=torch.ones(1, len(prompt)),
        )  # fmt: skip
        return time.perf_counter() - started

    return step


if __name__ == "__main__":
    main()
