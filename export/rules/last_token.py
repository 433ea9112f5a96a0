"""An optional input that asks for the scores of the last positions only.

Scoring is the largest product of a small model, and of a prompt only the last scores are needed.
`num_logits_to_keep` is an initializer that a client may override: 0, the default, scores every
position, and clients that do not know the input never see it. A negative number of T or more keeps
none: so a part of a prompt that has more behind it is read for its keys and values alone.

What is not kept is dropped as early as possible: behind the last attention a position depends on no
other one, and so the last projection and feed-forward layer, too, see only what is scored.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from gptopt.export.contract import KEEP
from gptopt.export.graphs import Dim, constant, dims, int_of
from gptopt.export.rules.rule import Rule

_END = np.array([np.iinfo(np.int64).max])
_ELEMENTWISE = {"Add", "Div", "Mul", "Tanh"}  # what may stand between the head and the logits
# Of (B, T, C) they compute each position for itself.
_POINTWISE = _ELEMENTWISE | {
    "BiasGelu", "Cast", "Erf", "FastGelu", "Gelu", "Identity", "Pow", "QuickGelu", "Relu",
    "Sigmoid", "Sub",
}  # fmt: skip
_NORMS = {
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip


class Match(NamedTuple):
    """The product that makes the scores, and what stands between it and the logits."""

    head: ir.Node
    behind: list[ir.Node]


def match(model: ir.Model, node: ir.Node) -> Match | None:
    """The nearest product above the logits."""
    behind: list[ir.Node] = []
    current = model.graph.outputs[0].producer()
    while current is not None and current.op_type != "MatMul":
        behind.append(current)
        source = next((x for x in current.inputs if x is not None and x.const_value is None), None)
        current = None if source is None else source.producer()
    return Match(node, behind) if current is node else None


def refuse(found: Match) -> str | None:
    """Positions must stay apart between the product and the logits."""
    if other := [node.op_type for node in found.behind if node.op_type not in _ELEMENTWISE]:
        return f"{other[0]} stands between the head and the logits"
    if len(dims(found.head.inputs[0])) != 3:
        return "the head does not read (B, T, C)"
    return None


def rewrite(model: ir.Model, found: Match) -> None:
    """Everything from the last attention on reads the last positions: from -n to the end.

    For n = 0 these are all of them.
    """
    keep = ir.Value(
        name=KEEP, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.zeros(1, np.int64), name=KEEP),
    )  # fmt: skip
    model.graph.register_initializer(keep)
    model.graph.inputs.append(keep)
    rows = dims(found.head.inputs[0])[:2]
    cone = _cone(found.head, rows)
    first = next(node for node in model.graph if node in cone)
    start = ir.node("Neg", [keep])
    start.outputs[0].shape, start.outputs[0].type = keep.shape, keep.type
    model.graph.insert_before(first, start)
    end, axis = (constant(model, first, array) for array in (_END, np.array([1])))
    cut: dict[ir.Value, ir.Value] = {}
    for node in [node for node in model.graph if node in cone]:
        for index, value in enumerate(node.inputs):
            if value is None or not _is_stream(value, rows) or value.producer() in cone:
                continue
            if value not in cut:
                last = ir.node("Slice", [value, start.outputs[0], end, axis])
                last.outputs[0].shape, last.outputs[0].type = _shortened(value), value.type
                model.graph.insert_before(node, last)
                cut[value] = last.outputs[0]
            node.replace_input_with(index, cut[value])
    for node in cone - {found.head}:
        for output in node.outputs:
            output.shape = _shortened(output) if output.shape is not None else None


def _cone(head: ir.Node, rows: tuple[Dim, ...]) -> set[ir.Node]:
    """The head, and what is read for it alone and computes each position for itself."""
    cone, waiting = {head}, [head]
    while waiting:
        for value in waiting.pop().inputs:
            node = None if value is None else value.producer()
            if node is None or node in cone or not _is_pointwise(node, rows):
                continue
            if all(reader in cone for output in node.outputs for reader in output.consumers()):
                cone.add(node)
                waiting.append(node)
    return cone


def _is_pointwise(node: ir.Node, rows: tuple[Dim, ...]) -> bool:
    inputs = [value for value in node.inputs if value is not None]
    others = [value for value in inputs if not _is_stream(value, rows)]
    if len(others) == len(inputs) or any(output.is_graph_output() for output in node.outputs):
        return False
    if node.op_type == "MatMul":
        return others == inputs[1:] and len(dims(inputs[1])) == 2
    if any(len(dims(value)) > 1 for value in others):
        return False
    if node.op_type in _NORMS:
        return int_of(node, "axis", -1) in (-1, 2)
    return node.op_type in _POINTWISE


def _is_stream(value: ir.Value, rows: tuple[Dim, ...]) -> bool:
    """Whether a value is (B, T, any)."""
    return len(dims(value)) == 3 and dims(value)[:2] == rows


def _shortened(value: ir.Value) -> ir.Shape:
    return ir.Shape([size if axis != 1 else None for axis, size in enumerate(dims(value))])


RULE = Rule(name="last_token", match=match, refuse=refuse, rewrite=rewrite)
