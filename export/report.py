"""report.json: what an export made of a model, and how each of its files proved."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from gptopt.export.folder import GraphFile
from gptopt.export.notes import Notes
from gptopt.export.pipeline import Build
from gptopt.export.quality import Quality
from gptopt.export.search import Found
from gptopt.export.targets import Target
from gptopt.export.validate import Proof


@dataclass(slots=True)
class Variant:
    """One ONNX file that was written and proven."""

    file: GraphFile
    graph: dict[str, Any]
    proof: Proof
    notes: Notes
    quality: Quality | None = None
    search: Found | None = None
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the proof does not hold, or too much is lost on held-out text."""
        lost = self.quality is not None and self.quality.failure is not None
        return lost or not self.proof.passed

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {
            **self.proof.as_dict(),
            "quality": self.quality and self.quality.as_dict(),
            "search": self.search and self.search.as_dict(),
            "adapters": self.adapters,
            "file": self.file.facts.file,
            "padding": self.file.facts.padding,
            "cache": self.file.facts.cache,
            "graph": self.graph,
            "notes": self.notes.as_list(),
            "seconds": _rounded(self.seconds),
        }


def graph_facts(graph: ir.Model, target: Target) -> dict[str, Any]:
    """What can be said of a graph without running it."""
    operators = sorted({f"{node.domain or 'ai.onnx'}.{node.op_type}" for node in graph.graph})
    return {
        "target": target.name,
        "opset": target.opset,
        "ir_version": target.ir_version,
        "nodes": graph.graph.num_nodes(),
        "attention": target.attention,
        "operators": operators,
    }


def report_of(
    folder: Path, model: nn.Module, build: Build, variants: Sequence[Variant]
) -> dict[str, Any]:
    """The first variant's proof at the top, and each variant with its own."""
    import onnxruntime
    import torch

    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    first = variants[0]
    return {
        **first.as_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "files": files,
        "variants": {each.file.precision: each.as_dict() for each in variants},
        "seconds": _rounded({**build.seconds, **first.seconds}),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(taken, 3) for stage, taken in seconds.items()}
