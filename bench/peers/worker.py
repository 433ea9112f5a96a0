"""One contender: loads its model, then answers commands, JSON a line, on stdin and stdout.

    python worker.py --peer NAME --model PATH --variant V --threads N
    python worker.py --peer NAME --model SOURCE --variant V --prepare OUT

Commands: {"rows": B, "tokens": T, "new": n, "seed": s, "vocab": V} generates, {"memory": 1} tells
peak memory.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Serve until stdin ends."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser()
    for flag in ("--peer", "--model", "--variant"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prepare")
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    try:
        module = _load(given.peer)
        if given.prepare:
            module.prepare(Path(given.model), Path(given.prepare), given.variant)
            return
        imported = time.perf_counter()
        peer = module.Peer(Path(given.model), given.variant, given.threads)
        loaded = time.perf_counter()
    except Exception as error:
        _answer(answers, error=f"{type(error).__name__}: {error}"[:400])
        return
    _answer(
        answers, version=peer.version, disk_bytes=peer.disk_bytes, cache_bytes=peer.cache_bytes,
        import_s=imported - began, load_s=loaded - imported, **memory(),
    )  # fmt: skip
    for line in sys.stdin:
        command = json.loads(line)
        try:
            found = {} if "memory" in command else generate(peer, **command)
            _answer(answers, **found, **memory())
        except Exception as error:
            _answer(answers, error=f"{type(error).__name__}: {error}"[:400])


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"peer_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate(peer: Any, rows: int, tokens: int, new: int, seed: int, vocab: int) -> dict[str, Any]:
    """One turn: random ids in, times and the new tokens out."""
    import numpy as np

    ids = np.random.default_rng(seed).integers(0, vocab, size=(rows, tokens))
    made, stamps = peer.generate(ids, new)
    made = np.asarray(made)
    if made.shape != (rows, new):
        raise ValueError(f"made {made.shape} tokens, {(rows, new)} were asked for")
    found: dict[str, Any] = {
        "first_ms": (stamps[1] - stamps[0]) * 1e3,
        "made": made.astype(int).tolist(),
    }
    if new > 1:
        found["tokens_per_s"] = rows * (len(stamps) - 2) / (stamps[-1] - stamps[1])
    return found


def memory() -> dict[str, float]:
    """Peak resident memory in MiB; nothing where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return {"peak_mib": int(peak) / 1024}


def _answer(stream: TextIO, **values: Any) -> None:
    stream.write(json.dumps(values) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
