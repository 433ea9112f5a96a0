"""Graphs that are wrong on purpose, by the hundred: is the wrong operator named?

    python -m gptopt.bench.faults [--out bench/results/bisect.json] [--every N]

Every kind of fault is planted wherever it fits: in every layer of small models, for several targets
and for a quantised file. A fault counts as located where the bisection names the node that was
changed; apart from that it is counted where the node is one of those between the last right results
and the named one.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from gptopt.bench.fault_kinds import IN_WEIGHTS, KINDS, readers_of_weights
from gptopt.cli import in_one_line
from gptopt.config import ModelConfig
from gptopt.export.bisect import Bisection, Departure
from gptopt.export.cache import quantize_cache
from gptopt.export.calibration import Calibration
from gptopt.export.notes import Notes
from gptopt.export.pipeline import Build, build_graph
from gptopt.export.quantize import quantize_graph
from gptopt.export.targets import TARGETS
from gptopt.model import GPT
from gptopt.precisions import PRECISIONS
from gptopt.runtime.variants import EdgeFile

logger = logging.getLogger(__name__)

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 32, "vocab_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_head": True},
    "llama": {
        "tie_head": False, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu",
        "n_kv_head": 2, "bias": False,
    },
}  # fmt: skip
INT8_CACHE = "int8-cache"  # float32 with keys and values in int8
FORMS = (
    ("standard-growing", "fp32"), ("portable", "fp32"), ("ort-cpu", "fp32"), ("portable", "q4"),
    ("portable", "fp16"), ("portable", "q4f16"), ("portable", INT8_CACHE),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """One change of one node. `nodes` are the node and what was put before it."""

    kind: str
    node: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A right graph of a model."""

    name: str
    path: Path
    bisection: Bisection
    file: EdgeFile


@torch.no_grad()
def random_model(name: str, seed: int = 0) -> GPT:
    """A small model in which every weight matters."""
    model = GPT(ModelConfig(**{**SIZES, **MODELS[name]}), kernels="reference")
    generator = torch.Generator().manual_seed(seed)
    for label, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(0.2 * values + (0.0 if label.endswith("bias") else 1.0))
        else:
            scale = 0.5 if label.startswith("w") else 2.0 * parameter.shape[1] ** -0.5
            parameter.copy_(scale * values)
    return model.eval()


def ranges(model: GPT) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What random tokens put into the cache."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SIZES["vocab_size"], (1024,), generator=generator)
    return Calibration(model, ids.tolist()).cache_ranges()


def cases(folder: Path, names: Collection[str] | None = None) -> Iterator[Case]:
    """The graphs that faults are planted in, or those of these names."""
    for name in MODELS:
        model = random_model(name)
        bisection = Bisection(model)
        for target_name, precision in FORMS:
            path = folder / f"{name}-{target_name}-{precision}.onnx"
            if names is not None and path.stem not in names:
                continue
            target = TARGETS[target_name]
            graph = build_graph(model, model.config, Build(target))
            cache_dtype = "float32"
            if precision == INT8_CACHE:
                graph, cache_dtype = quantize_cache(graph, ranges(model), Notes()), "int8"
            elif precision != "fp32":
                graph = quantize_graph(graph, PRECISIONS[precision], Notes())
                cache_dtype = PRECISIONS[precision].floats
            for index, node in enumerate(graph.graph):
                node.name = node.name or f"{node.op_type}_{index}"
            ir.save(graph, path)
            file = target.facts("onnx/model.onnx", cache_dtype)
            yield Case(path.stem, path, bisection, file)


def faults(case: Case, kinds: Collection[str] = KINDS.keys()) -> Iterator[tuple[Fault, ir.Model]]:
    """Every fault of these kinds that fits somewhere in a graph."""
    graph = ir.load(case.path)
    for kind in kinds:
        plant = KINDS[kind]
        for index in range(graph.graph.num_nodes()):
            node = list(graph.graph)[index]
            name = node.name or ""
            if not plant(graph, node):  # and left the graph as it was
                continue
            added = (each.name or "" for each in graph.graph)
            nodes = (name, *(each for each in added if each.startswith(f"{name}.")))
            if kind in IN_WEIGHTS:  # which another node may read before
                nodes += readers_of_weights(node)
            yield Fault(kind, name, nodes), graph
            graph = ir.load(case.path)


def judge(case: Case, fault: Fault, graph: ir.Model, folder: Path) -> dict[str, Any]:
    """Plant, look, compare: one row of the table."""
    path = folder / "faulty.onnx"
    ir.save(graph, path)
    found: Departure | None = case.bisection.locate(path, case.file)
    exact = found is not None and found.node in fault.nodes
    near = found is not None and bool(set(found.nodes) & set(fault.nodes))
    return {
        "case": case.name, "kind": fault.kind, "node": fault.node,
        "found": None if found is None else found.node,
        "layer": None if found is None else found.layer,
        "compared": None if found is None else found.compared,
        "exact": exact, "between": near,
        "nodes": 0 if found is None else len(found.nodes),
    }  # fmt: skip


def run(every: int = 1) -> dict[str, Any]:
    """The table of every `every`-th fault."""
    torch.set_num_threads(1)
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        for case in cases(Path(name)):
            assert case.bisection.locate(case.path, case.file) is None
            for index, (fault, graph) in enumerate(faults(case)):
                if index % every == 0:
                    rows.append(judge(case, fault, graph, Path(name)))
    return {**summary(rows), "seconds": round(time.monotonic() - started, 1), "rows": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all faults and by kind."""

    def count(part: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "faults": len(part),
            "located": sum(row["exact"] for row in part),
            "between": sum(row["between"] for row in part),
            "missed": sum(row["found"] is None for row in part),
        }

    kinds = {kind: count([row for row in rows if row["kind"] == kind]) for kind in KINDS}
    return {**count(rows), "kinds": {kind: each for kind, each in kinds.items() if each["faults"]}}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m gptopt.bench.faults", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/bisect.json"))
    parser.add_argument("--every", type=int, default=1, help="of so many faults take one")
    options = parser.parse_args()
    table = run(options.every)
    rows = ",\n  ".join(json.dumps(row) for row in table.pop("rows"))
    text = json.dumps(table, indent=1)[:-2] + f',\n "rows": [\n  {rows}\n ]\n}}\n'
    options.out.write_text(text, encoding="utf-8")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("%d of %d faults located", table["located"], table["faults"])


if __name__ == "__main__":
    sys.exit(in_one_line(main))
