"""Where the time goes in an exported folder: onnxruntime's own profile, by operator.

    python -P -m gptopt.bench.edge_profile FOLDER --precision q4 --prompt 32 --out FILE
    python -P -m gptopt.bench.edge_profile FOLDER --precision q8 --prompt 512 --tokens 0

Of tokens behind a prompt, or with `--tokens 0` of reading the prompt. The profiler costs some
microseconds a node, which weighs on small nodes most. An operator's time is the sum of its nodes'
medians; the time without the profiler stands beside it. So does what an operator needs, and how
fast this machine can give it, measured before and after: a token must read its weights (and
attention the cache) from memory, a prompt must multiply.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir

from gptopt.bench.machine import write
from gptopt.bench.peers import bandwidth
from gptopt.bench.product_rate import product_rate
from gptopt.cli import in_one_line
from gptopt.runtime.edge import EdgeModel
from gptopt.runtime.folder import model_file

_WHOLE = ("DynamicQuantizeMatMul", "MatMulNBits")  # multiply in int8
_WARM_UP = 24  # tokens, after which the weights lie where they stay
_PROMPTS = 5  # readings of a prompt that count
_READINGS = 40  # of 512 MiB, before the decoding and after it


def main() -> None:
    """Print the profile, and write it to --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="behind it; 0: profile the prompt")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    if given.tokens:
        found = profile(given.folder, given.precision, given.prompt, given.tokens, given.threads)
    else:
        found = profile_prompt(given.folder, given.precision, given.prompt, given.threads)
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
    probe = bandwidth.Peer(folder, "read", plain.settings.threads)
    readings = probe.seconds(_READINGS)
    times = _decode(plain, prompt, tokens)
    readings += probe.seconds(_READINGS)
    del probe
    events = _events(folder, precision, threads, lambda model: _decode(model, prompt, tokens))
    cache = plain.layer_bytes * (prompt + _WARM_UP + tokens // 2)
    graph = ir.load(model_file(folder, plain.file.file)).graph
    weights = {name: size for name, (size, _) in _weights(graph).items()}

    def needs(op: str, name: str, rows: int) -> int:
        return weights.get(name, cache if "Attention" in op else 0)

    return {
        **_told(plain, folder, prompt),
        "token_ms": statistics.median(times) * 1e3,
        "memory_gb_per_s": bandwidth.BYTES / statistics.median(readings) / 1e9,
        "operators": _by_operator(events, tokens, 1, needs, "bytes"),
    }


def profile_prompt(folder: Path, precision: str, prompt: int, threads: int = 0) -> dict[str, Any]:
    """The reading of a prompt, in the parts that the runtime cuts it into.

    Returns:
        first_ms: median until the scores are there, without the profiler; ops_per_s: of the best
        product on this machine, multiplications and additions, in int8 where the file's products
        are; operators: as `profile` gives them, with `ops` (that it must compute) for bytes.
    """
    plain = _Watched(folder, precision=precision, threads=threads)
    graph = ir.load(model_file(folder, plain.file.file)).graph
    weights = {name: count for name, (_, count) in _weights(graph).items()}
    whole = any(node.op_type in _WHOLE for node in graph)
    rates = [product_rate(whole=whole, threads=plain.settings.threads)]
    times = _read(plain, prompt)
    rates.append(product_rate(whole=whole, threads=plain.settings.threads))
    events = _events(folder, precision, threads, lambda model: _read(model, prompt))
    runs = sum(event["name"] == "model_run" for event in events)
    parts = runs // (_PROMPTS + 1)  # the first reading warms up
    # Queries times keys, and weights times values, of what a causal model sees.
    channels = _query_heads(graph) * plain.config["head_size"]
    attended = 2 * channels * prompt * (prompt + 1) // parts

    def needs(op: str, name: str, rows: int) -> int:
        return 2 * rows * weights.get(name, 0) + (attended if "Attention" in op else 0)

    return {
        **_told(plain, folder, prompt),
        "first_ms": statistics.median(times) * 1e3,
        "ops_per_s": max(rates),
        "operators": _by_operator(events, parts * _PROMPTS, parts, needs, "ops"),
    }


def _told(model: "_Watched", folder: Path, prompt: int) -> dict[str, Any]:
    return {
        "folder": folder.name,
        "precision": model.precision,
        "prompt_tokens": prompt,
        "threads": model.settings.threads,
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


def _events(
    folder: Path, precision: str, threads: int, run: Callable[[EdgeModel], Any]
) -> list[dict[str, Any]]:
    """What onnxruntime's profiler wrote down while a model of its own ran."""
    import onnxruntime

    real = onnxruntime.SessionOptions
    with tempfile.TemporaryDirectory() as scratch:

        def options() -> Any:
            made = real()
            made.enable_profiling, made.profile_file_prefix = True, str(Path(scratch) / "ort")
            return made

        with mock.patch.object(onnxruntime, "SessionOptions", options):
            watched = _Watched(folder, precision=precision, threads=threads)
        run(watched)
        found: list[dict[str, Any]] = json.loads(
            Path(watched.end_profiling()).read_text(encoding="utf-8")
        )
    return found


def _decode(model: EdgeModel, prompt: int, tokens: int) -> list[float]:
    """Seconds of each token behind the prompt and the warm-up."""
    cache, live = model.new_cache(), np.ones(1, np.bool_)
    token = cache.read([_text(model, prompt)]).argmax(-1)
    taken = []
    for _ in range(_WARM_UP + tokens):
        began = time.perf_counter()
        token = cache.step(token, live).argmax(-1)
        taken.append(time.perf_counter() - began)
    return taken[_WARM_UP:]


def _read(model: EdgeModel, prompt: int) -> list[float]:
    """Seconds of each reading of a prompt, after one that warms up."""
    cache, text, taken = model.new_cache(), _text(model, prompt), []
    for _ in range(_PROMPTS + 1):
        cache.rewind(0)
        began = time.perf_counter()
        cache.read([text])
        taken.append(time.perf_counter() - began)
    return taken[1:]


def _text(model: EdgeModel, tokens: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(0, model.tokenizer_size, tokens).tolist()
    return ids


def _weights(graph: ir.Graph) -> dict[str, tuple[int, int]]:
    """Of each product's node: bytes of weight, scales and zero points; number of weights."""
    found = {}
    for node in graph:
        if "MatMul" in node.op_type:
            sizes = [_stored(value) for value in node.inputs]
            count = sizes[1][1]
            if node.op_type == "MatMulNBits":
                count = node.attributes["K"].as_int() * node.attributes["N"].as_int()
            found[node.name or ""] = sum(size for size, _ in sizes), count
    return found


def _query_heads(graph: ir.Graph) -> int:
    """Of one attention; 0 where the graph has none as one node."""
    node = next((node for node in graph if "Attention" in node.op_type), None)
    if node is None:
        return 0
    for name in ("num_heads", "q_num_heads"):
        if name in node.attributes:
            return node.attributes[name].as_int()
    query = node.inputs[0]  # (B, H, T, D)
    assert query is not None
    assert query.shape is not None
    heads = query.shape[1]
    assert isinstance(heads, int)
    return heads


def _stored(value: ir.Value | None) -> tuple[int, int]:
    """Bytes and elements of a constant, also where a Transpose stands before its reader."""
    if value is not None and value.const_value is not None:
        return value.const_value.nbytes, value.const_value.size
    producer = None if value is None else value.producer()
    turned = producer is not None and producer.op_type == "Transpose"
    return _stored(producer.inputs[0]) if producer is not None and turned else (0, 0)


def _by_operator(
    events: list[dict[str, Any]], runs: int, parts: int, needs: Callable[[str, str, int], int],
    unit: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Nodes of the last runs, added up by operator and, of products, width.

    Args:
        events: of onnxruntime's profile.
        runs: how many of the last ones count.
        parts: runs that belong together: their times are added up before the median is taken.
        needs: what a node of an operator, by its name and the rows of its output, cannot do
            without in one run.
        unit: the key that it is told under.
    """
    begins = sorted(event["ts"] for event in events if event["name"] == "model_run")
    nodes: dict[tuple[str, int, str], list[tuple[float, int]]] = defaultdict(list)
    for event in sorted(events, key=lambda event: float(event.get("ts", 0))):
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        if event["ts"] < begins[-runs]:
            continue
        told = event["args"]
        op, name = told["op_name"], event["name"].removesuffix("_kernel_time")
        width = rows = 0
        if "MatMul" in op:
            *sizes, width = next(iter(told["output_type_shape"][0].values()))
            rows = math.prod(sizes)
        nodes[op, width, name].append((event["dur"], needs(op, name, rows)))
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for (op, width, _), seen in nodes.items():
        row = found.setdefault(
            (op, width), {"op": op, "width": width, "nodes": 0, "us": 0.0, unit: 0}
        )
        whole = [seen[at : at + parts] for at in range(0, len(seen), parts)]
        row["nodes"] += 1
        row["us"] += statistics.median(sum(us for us, _ in each) for each in whole)
        row[unit] += sum(need for _, need in whole[-1])
    total = sum(row["us"] for row in found.values())
    rows_found = [{**row, "share": row["us"] / total} for row in found.values()]
    return sorted(rows_found, key=lambda row: -float(row["us"]))


if __name__ == "__main__":
    sys.exit(in_one_line(main))
