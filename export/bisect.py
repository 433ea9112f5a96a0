"""Where a wrong graph goes wrong: the first operator that departs from the reference.

What the operators of the graph read and write is made an output of a temporary copy and compared,
in graph order, with the steps of the recorded program (steps.py), by the budget of the proof. The
parameters that a node reads tell which step it is, so fused and quantised nodes are found as well.
Where nothing of the model corresponds to a node's result (a mask in the making, half an
activation), it counts with the next result that has a counterpart.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from gptopt.errors import first_line
from gptopt.export.contract import Contract
from gptopt.export.counterparts import LENGTHS, Check, checks_of, output_key, reader_of
from gptopt.export.plays import inputs, lengths, mask_error, plays, real_part, typed
from gptopt.export.steps import Feeds, Key, Steps, layer_of, record
from gptopt.export.trace import Exportable, trace
from gptopt.export.twin import (
    OF_READER,
    Held,
    exact_model,
    held_by,
    same_model,
    save_scratch,
    write_strict_twin,
)
from gptopt.export.weights import strange_scales, strange_weights
from gptopt.runtime.session import WEIGHTS
from gptopt.runtime.variants import EdgeFile

logger = logging.getLogger(__name__)

_TORCH_FACTOR = 2.0
_RANGE_FACTOR = 2e-5
_READ = ("input", "q", "k", "v", "unrotated q", "unrotated k")  # steps that a node reads
_MOVERS = ("Slice", "Reshape", "Transpose", "Cast", "Identity", "Split", "Expand")


@dataclass(frozen=True, kw_only=True, slots=True)
class Departure:
    """The first operator that does not say what the model says.

    Attributes:
        node: its name in the graph. op_type: its operator.
        layer: number of the layer; None outside of the layers.
        compared: what was compared, in words.
        error: largest distance from float64. budget: the largest that passes.
        play: which inputs showed it.
        nodes: all nodes since the last right results, the named one included.
    """

    node: str
    op_type: str
    layer: int | None
    compared: str
    error: float
    budget: float
    play: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        place = "" if self.layer is None else f" of layer {self.layer}"
        return (
            f"{self.node} ({self.op_type}{place}) departs first: {self.compared}, error "
            f"{self.error:.2e}, budget {self.budget:.2e}, in {self.play}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return asdict(self)


class Bisection:
    """A recorded model that graphs are compared with; several graphs need one record only.

    Args:
        model: as for `validate.prove`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = cast(Exportable, model).config
        self.contract = Contract.of(self.config)
        self._program = trace(model, self.contract)
        self._kept: dict[str, list[tuple[Feeds, list[Steps]]]] = {}

    def recorded(self, held: Held, file: EdgeFile) -> list[tuple[Feeds, list[Steps]]]:
        """Inputs, and the steps of the model in float64 and in the file's precision."""
        if held.exact and file.padding in self._kept:
            return self._kept[file.padding]
        originals = {name: tensor.detach() for name, tensor in self.model.named_parameters()}
        weights, tables = [], []
        for make in (exact_model, same_model):
            parameters = make(self.model, held).named_parameters()
            weights.append({name: tensor.detach() for name, tensor in parameters})
            dtype = next(iter(weights[-1].values())).dtype
            names = {*held.products, *held.tables} & {*originals}
            tables.append({n: held.tables.get(n, originals[n]).to(dtype) for n in names})
        found = []
        for feeds in plays(self.contract, file, self.config.block_size):
            steps = [
                record(self._program, each, typed(feeds, each), table)
                for each, table in zip(weights, tables, strict=True)
            ]
            found.append((feeds, steps))
        if held.exact:
            self._kept[file.padding] = found
        return found

    def locate(self, path: Path, file: EdgeFile | None = None) -> Departure | None:
        """The first operator of an ONNX file that departs from the model; None where none does.

        Args:
            path: the ONNX file.
            file: what is known of the file; none: a growing cache, padding anywhere.
        """
        file, held = file or EdgeFile(), held_by(path)
        graph = ir.load(path)
        nodes = list(graph.graph)
        found = [
            _departure(nodes, [reader], odd.name, odd.error, odd.bound, "a comparison of weights")
            for odd in strange_weights(graph, self.model, held)
            if (reader := reader_of(odd.value)) is not None
        ]
        strict, held = not held.exact, held.strict()
        with TemporaryDirectory(prefix="gptopt-") as scratch:
            twin = Path(scratch, "bisected.onnx")
            if strict:
                write_strict_twin(path, twin)
            run = _Run(twin if strict else path, path.parent, held, file)
            recorded = self.recorded(held, file)
            found += run.departures(twin, nodes, recorded)
        if held.cache:
            found += [
                _departure(nodes, [node], odd.name, odd.error, odd.bound, recorded[0][0].name)
                for node, odd in strange_scales(graph, held, recorded[0][1][1])
            ]
        order = {node.name: index for index, node in enumerate(nodes)}
        return min(found, key=lambda each: order[each.node], default=None)


def locate(path: Path, model: nn.Module, *, file: EdgeFile | None = None) -> Departure | None:
    """The first operator of an ONNX file that departs from a model, see Bisection."""
    return Bisection(model).locate(path, file)


def diagnose(path: Path, model: nn.Module, file: EdgeFile | None = None) -> Departure | str:
    """Where a file that failed its proof departs from the model, or why that cannot be said."""
    try:
        found = locate(path, model, file=file)
    except Exception as error:  # the proof has failed: nothing may stand in the way of saying so
        logger.debug("bisection of %s", path, exc_info=True)
        return f"no operator could be named ({first_line(error)})"
    return "each operator alone is within its budget" if found is None else found


def explain(path: Path, model: nn.Module, file: EdgeFile | None = None) -> str:
    """What `diagnose` says, in a line."""
    return str(diagnose(path, model, file))


def _departure(
    nodes: Sequence[ir.Node], region: Sequence[ir.Node], compared: str, error: float,
    budget: float, play: str, layer: int | None = None,
) -> Departure:  # fmt: skip
    """`region` ends with the node to name."""
    names = [_original(nodes, node) for node in region]
    last = names[-1]
    return Departure(
        node=last.name or "", op_type=last.op_type,
        layer=layer if layer is not None else layer_of(compared),
        compared=compared, error=error, budget=budget, play=play,
        nodes=tuple(dict.fromkeys(node.name or "" for node in names)),
    )  # fmt: skip


def _original(nodes: Sequence[ir.Node], node: ir.Node) -> ir.Node:
    """The node of the file that stands where one of its copy stands."""
    name = (node.name or "").partition(OF_READER)[0]
    names = {name} | {output.name for output in node.outputs if output.name}
    for each in nodes:
        if each is node or any(output.name in names for output in each.outputs if output.name):
            return each
    return node if name in {each.name for each in nodes} else nodes[-1]


@dataclass(slots=True)
class _Run:
    """One graph beside one model."""

    path: Path
    weights: Path  # the folder of its data
    held: Held
    file: EdgeFile

    def departures(
        self, copy: Path, nodes: Sequence[ir.Node], plays: Sequence[tuple[Feeds, list[Steps]]]
    ) -> list[Departure]:
        """The first departure of each play. `copy` is where a graph may be written."""
        import onnxruntime

        graph = ir.load(self.path)
        ir.external_data.set_base_dir(graph.graph, self.weights)
        checks = _all_checks(graph)
        known = set(graph.graph.outputs)
        for check in checks:
            value = check.value
            if value is not None and value.producer() is not None and value not in known:
                known.add(value)
                graph.graph.outputs.append(value)
        outputs = [value.name or "" for value in graph.graph.outputs]
        save_scratch(graph, copy)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(WEIGHTS, str(self.weights.absolute()))
        session = onnxruntime.InferenceSession(copy, options, providers=["CPUExecutionProvider"])
        types = {each.name: each.type for each in session.get_inputs()}
        found = []
        for feeds, steps in plays:
            values = dict(
                zip(outputs, session.run(outputs, inputs(feeds, types, self.file)), strict=True)
            )
            found += self._first(feeds, checks, steps, values, nodes)
        return found

    def _first(
        self, feeds: Feeds, checks: Sequence[Check], steps: Sequence[Steps],
        values: Mapping[str, npt.NDArray[Any]], nodes: Sequence[ir.Node],
    ) -> list[Departure]:  # fmt: skip
        seen: dict[Key, int] = defaultdict(int)
        good: set[ir.Value] = set()
        foreign: set[ir.Node] = set()  # read a parameter once more than the model does
        for check in checks:
            expected = lengths(feeds, self.file) if check.key[0] in LENGTHS else None
            if expected is None:
                pair = [each.values.get(check.key, [])[seen[check.key] :] for each in steps]
                if not all(pair):
                    if seen[check.key]:
                        foreign.add(check.node)
                    continue
                double, single = (each[0] for each in pair)
                if check.key[0] not in ("mask", "cosines", "sines"):
                    seen[check.key] += 1
                last = steps[0].modules.get(check.key, check.key[1])
            else:
                double = single = expected[check.key[0]]
                last = steps[0].modules.get(("attention", check.key[1]), "")
            value = None if check.value is None else values.get(check.value.name or "")
            if check.value is not None and value is None:
                continue  # an input or a constant: nobody computed it
            error, budget = self._compare(check, feeds, value, double, single)
            if error <= budget:
                if check.value is not None:
                    good.add(check.value)
                continue
            start = check.node if check.value is None else cast(ir.Node, check.value.producer())
            text = f"{check.key[0]} of {check.key[1] if not check.key[1].isdigit() else last}"
            layer = layer_of(last) if last else None
            wired = check.value is None or (
                check.key[0] in _READ and self._is_another(check, feeds, value, steps)
            )
            if wired:
                region = [check.node]
            else:
                region = _region(start, good)
                region += [each for each in region if each in foreign][:1]
            return [_departure(nodes, region, text, error, budget, feeds.name, layer)]
        return []

    def _is_another(
        self, check: Check, feeds: Feeds, value: npt.NDArray[Any] | None, steps: Sequence[Steps]
    ) -> bool:
        """Whether what a node reads is right elsewhere: then it is the node that reads wrongly."""
        double, single = (each.values for each in steps)
        for key in double:
            if key[0] in _READ and key != check.key:
                for pair in zip(double[key], single[key], strict=True):
                    error, budget = self._compare(check, feeds, value, *pair)
                    if error <= budget and budget:
                        return True
        return False

    def _compare(
        self, check: Check, feeds: Feeds, value: npt.NDArray[Any] | None, double: Tensor,
        single: Tensor,
    ) -> tuple[float, float]:  # fmt: skip
        """(error, budget)."""
        if check.key[0] == "mask":
            return mask_error(check, feeds, self.file, value, double), 1e-6
        assert value is not None
        if check.key[0] in LENGTHS:
            return float(np.abs(value.reshape(-1) - double.numpy()).max()), 0.0
        wanted, rough, mine = (
            real_part(array, feeds) for array in (double, single, torch.from_numpy(value))
        )
        if mine is None or wanted is None or rough is None or mine.numel() != wanted.numel():
            return 0.0, 0.0  # another layout: nothing to hold it to
        mine, wanted, rough = (x.double().reshape(-1) for x in (mine, wanted, rough))
        if not bool(torch.isfinite(mine).all()):
            return np.inf, 0.0
        spread = float(wanted.max() - wanted.min())
        torch_error = float((rough - wanted).abs().max())
        budget = max(_TORCH_FACTOR * torch_error, _RANGE_FACTOR * spread)
        return float((mine - wanted).abs().max()), budget


def _all_checks(graph: ir.Model) -> list[Check]:
    """In the order of the graph."""
    checks = [check for node in graph.graph for check in checks_of(node)]
    for value in graph.graph.outputs:
        key, node = output_key(value.name or ""), value.producer()
        if key is not None and node is not None:
            checks.append(Check(value, key, node))
    order = {node: index for index, node in enumerate(graph.graph)}
    return sorted(checks, key=lambda check: order[check.node])


def _region(start: ir.Node, good: set[ir.Value]) -> list[ir.Node]:
    """What lies between right results and a node; last the node to name.

    That is the one which computed what the others only moved.
    """
    found, waiting = {start: None}, [start]
    while waiting:
        for value in waiting.pop().inputs:
            node = None if value is None or value in good else value.producer()
            if node is not None and node not in found:
                found[node] = None
                waiting.append(node)
    named = start
    while named.op_type in _MOVERS:
        value = named.inputs[0]
        node = None if value is None or value in good else value.producer()
        if node is None:
            break
        named = node
    return [*(node for node in list(found)[::-1] if node is not named), named]
