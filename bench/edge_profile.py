"""Where a token's time goes in an exported folder: onnxruntime's own profile, by operator.

    python -P -m gptopt.bench.edge_profile FOLDER --precision q4 --prompt 32 --out FILE

The profiler itself costs some microseconds a node, which weighs on small nodes most. An operator's
time is the sum of its nodes' medians; the time of a token without the profiler stands beside it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from gptopt.bench.machine import write
from gptopt.runtime.edge import EdgeModel

_WARM_UP = 24  # tokens, after which the weights lie where they stay


def main() -> None:
    """Print the profile, and write it to --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    found = profile(given.folder, given.precision, given.prompt, given.tokens, given.threads)
    if given.out:
        write(given.out, found)
    print(json.dumps(found, indent=1))  # noqa: T201 - this program's result


def profile(
    folder: Path, precision: str, prompt: int, tokens: int, threads: int = 0
) -> dict[str, Any]:
    """The decoding of some tokens behind a prompt.

    Returns:
        token_ms: median, without the profiler; operators: of each {op, width (of the product, else
        0), nodes, us, share}, the largest first.
    """
    plain = EdgeModel(folder, precision=precision, threads=threads)
    times = _decode(plain, prompt, tokens)
    threads_used = plain.settings.threads
    with tempfile.TemporaryDirectory() as scratch:
        watched = _watched(folder, precision, threads, Path(scratch) / "ort")
        _decode(watched, prompt, tokens)
        events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
    operators = _by_operator(events, tokens)
    total = sum(row["us"] for row in operators)
    return {
        "folder": folder.name,
        "precision": plain.precision,
        "prompt_tokens": prompt,
        "threads": threads_used,
        "token_ms": statistics.median(times) * 1e3,
        "operators": [{**row, "share": row["us"] / total} for row in operators],
    }


class _Watched(EdgeModel):
    """A model whose session keeps a profile."""

    def end_profiling(self) -> str:
        """The path of the profile."""
        path: str = self._session._session.end_profiling()
        return path


def _watched(folder: Path, precision: str, threads: int, prefix: Path) -> _Watched:
    import onnxruntime

    real = onnxruntime.SessionOptions

    def options() -> Any:
        made = real()
        made.enable_profiling, made.profile_file_prefix = True, str(prefix)
        return made

    with mock.patch.object(onnxruntime, "SessionOptions", options):
        return _Watched(folder, precision=precision, threads=threads)


def _decode(model: EdgeModel, prompt: int, tokens: int) -> list[float]:
    """Seconds of each token behind the prompt and the warm-up."""
    cache, live = model.new_cache(), np.ones(1, np.bool_)
    random = np.random.default_rng(0)
    token = cache.read([random.integers(0, model.tokenizer_size, prompt).tolist()]).argmax(-1)
    taken = []
    for _ in range(_WARM_UP + tokens):
        began = time.perf_counter()
        token = cache.step(token, live).argmax(-1)
        taken.append(time.perf_counter() - began)
    return taken[_WARM_UP:]


def _by_operator(events: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Nodes of the last runs, added up by operator and, of products, width."""
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    nodes: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        if event["ts"] < runs[-tokens]:
            continue
        told = event["args"]
        width = 0
        if "MatMul" in told["op_name"]:
            width = next(iter(told["output_type_shape"][0].values()))[-1]
        nodes[told["op_name"], width, event["name"]].append(event["dur"])
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for (op, width, _), taken in nodes.items():
        row = rows.setdefault((op, width), {"op": op, "width": width, "nodes": 0, "us": 0.0})
        row["nodes"] += 1
        row["us"] += statistics.median(taken)
    return sorted(rows.values(), key=lambda row: -float(row["us"]))


if __name__ == "__main__":
    main()
