"""The stages in a row, from a model to the graph that every precision starts from.

trace -> lower -> clean -> fuse. Each stage is a function of its own; with a folder to keep them in,
what each one leaves can be looked at.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from torch import nn
from torch.export import ExportedProgram

from gptopt.config import ModelConfig
from gptopt.export.angles import tabulate_angles
from gptopt.export.contract import Contract
from gptopt.export.cuda_graph import note_cuda_graph
from gptopt.export.lowering import fit, lower
from gptopt.export.notes import Notes
from gptopt.export.opset17 import downgrade
from gptopt.export.passes import clean
from gptopt.export.registry import check_kernels
from gptopt.export.rules import fuse
from gptopt.export.rules.rotary_gqa import BLOCK_SIZE
from gptopt.export.targets import CUDA, Target
from gptopt.export.trace import trace
from gptopt.export.write import save, wants_data_file

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Build:
    """A model on its way through the stages.

    Attributes:
        target: as this model can use it, see `lowering.fit`.
        seconds: how long each stage took.
        keep: folder that receives what each stage leaves; None keeps nothing.
        program: the recorded model, where another target needed it before.
    """

    target: Target
    notes: Notes = field(default_factory=Notes)
    seconds: dict[str, float] = field(default_factory=dict)
    keep: Path | None = None
    program: ExportedProgram | None = None
    _started: float = field(default_factory=time.monotonic)

    def done(self, stage: str, graph: ir.Model | None = None) -> None:
        """Note the time since the last stage ended, and keep what it left."""
        now = time.monotonic()
        self.seconds[stage] = now - self._started
        if self.keep is not None and graph is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            path = self.keep / f"{self.target.name}-{stage}.onnx"
            save(graph, path, external=wants_data_file(graph, self.target.inline_limit_bytes))
        self._started = time.monotonic()


def build_graph(model: nn.Module, config: ModelConfig, build: Build) -> ir.Model:
    """The float32 graph of a model for a target.

    Raises:
        UserError: the model cannot be exported.
        CheckFailed: the target's runtime has no kernel for a node.
    """
    contract = Contract.of(config)
    logger.info("exporting %s for %s", type(model).__name__, build.target.name)
    program = build.program = build.program or trace(model, contract)
    build.target = fit(program, build.target, build.notes)
    contract = Contract.of(config, static=build.target.cache == "static")
    build.done("trace")
    graph = lower(program, contract, build.target)
    build.done("lower", graph)
    clean(graph)
    if build.target.angles == "tables":
        tabulate_angles(graph, config.block_size)
    if build.target.opset < 18:
        downgrade(graph)
    build.done("clean", graph)
    graph.graph.meta[BLOCK_SIZE] = config.block_size
    fuse(graph, build.target, build.notes)
    if build.target.provider == CUDA:
        note_cuda_graph(graph, build.notes)
    if "fp32" in build.target.precisions:
        check_kernels(graph, build.target, build.notes)
    build.done("fuse", graph)
    logger.info("exported to %d nodes", graph.graph.num_nodes())
    return graph
