"""Where a token's time goes in an exported folder: onnxruntime's own profile, by operator.

    python -P -m gptopt.bench.edge_profile FOLDER --precision q4 --prompt 32 --out FILE

The profiler itself costs some microseconds a node, which weighs on small nodes most. An operator's
time is the sum of its nodes' medians; the time of a token without the profiler stands beside it. So
does how fast memory was read before and after, and how many bytes each operator must read: weights
of products, and of attention the cache.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir

from gptopt.bench.machine import write
from gptopt.bench.peers import bandwidth
from gptopt.runtime.edge import EdgeModel
from gptopt.runtime.folder import model_file

_WARM_UP = 24  # tokens, after which the weights lie where they stay
_READINGS = 40  # of 512 MiB, before the decoding and after it


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
        token_ms: median, without the profiler; memory_gb_per_s: median; operators: of each {op,
        width (of the product, else 0), nodes, us, share, bytes (that it must read)}, the largest
        first.
    """
    plain = _Watched(folder, precision=precision, threads=threads)
    threads_used = plain.settings.threads
    probe = bandwidth.Peer(folder, "read", threads_used)
    readings = probe.seconds(_READINGS)
    times = _decode(plain, prompt, tokens)
    readings += probe.seconds(_READINGS)
    del probe
    with tempfile.TemporaryDirectory() as scratch:
        watched = _watched(folder, precision, threads, Path(scratch) / "ort")
        _decode(watched, prompt, tokens)
        events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
    cache = plain.layer_bytes * (prompt + _WARM_UP + tokens // 2)
    weights = _weight_bytes(model_file(folder, plain.file.file))
    operators = _by_operator(events, tokens, weights, cache)
    total = sum(row["us"] for row in operators)
    return {
        "folder": folder.name,
        "precision": plain.precision,
        "prompt_tokens": prompt,
        "threads": threads_used,
        "token_ms": statistics.median(times) * 1e3,
        "memory_gb_per_s": bandwidth.BYTES / statistics.median(readings) / 1e9,
        "operators": [{**row, "share": row["us"] / total} for row in operators],
    }


class _Watched(EdgeModel):
    """A model that tells of its cache, and whose session may keep a profile."""

    @property
    def layer_bytes(self) -> int:
        """Bytes of the keys and values of one token in one layer."""
        K, D = self._session.cache_shape
        return 2 * K * D * int(np.dtype(self._session.cache_dtype).itemsize)

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


def _weight_bytes(path: Path) -> dict[str, int]:
    """Name of a product's node -> bytes of its weight, scales and zero points."""
    found = {}
    for node in ir.load(path).graph:
        if "MatMul" in node.op_type:
            found[node.name or ""] = sum(map(_stored, node.inputs))
    return found


def _stored(value: ir.Value | None) -> int:
    """Bytes of a constant, also where a Transpose stands before its reader."""
    if value is not None and value.const_value is not None:
        return value.const_value.nbytes
    producer = None if value is None else value.producer()
    turned = producer is not None and producer.op_type == "Transpose"
    return _stored(producer.inputs[0]) if producer is not None and turned else 0


def _by_operator(
    events: list[dict[str, Any]], tokens: int, weights: Mapping[str, int], cache: int
) -> list[dict[str, Any]]:
    """Nodes of the last runs, added up by operator and, of products, width.

    Args:
        events: of onnxruntime's profile.
        tokens: how many runs count.
        weights: of products, bytes by node.
        cache: bytes that the attention of one layer reads.
    """
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
        name = event["name"].removesuffix("_kernel_time")
        nodes[told["op_name"], width, name].append(event["dur"])
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for (op, width, name), taken in nodes.items():
        row = rows.setdefault(
            (op, width), {"op": op, "width": width, "nodes": 0, "us": 0.0, "bytes": 0}
        )
        row["nodes"] += 1
        row["us"] += statistics.median(taken)
        row["bytes"] += weights.get(name, cache if "Attention" in op else 0)
    return sorted(rows.values(), key=lambda row: -float(row["us"]))


if __name__ == "__main__":
    main()
