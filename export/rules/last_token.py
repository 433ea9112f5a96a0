"""An optional input that asks for the scores of the last positions only.

Scoring is the largest product of a small model, and of a prompt only the last scores are needed.
`num_logits_to_keep` is an initializer that a client may override: 0, the default, scores every
position, and clients that do not know the input never see it.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from gptopt.export.contract import KEEP
from gptopt.export.graphs import constant, dims
from gptopt.export.rules.rule import Rule

_END = np.array([np.iinfo(np.int64).max])
_ELEMENTWISE = {"Add", "Div", "Mul", "Tanh"}


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
    """The head reads the last positions: from -n to the end, which for n = 0 is all of them."""
    keep = ir.Value(
        name=KEEP, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.zeros(1, np.int64), name=KEEP),
    )  # fmt: skip
    model.graph.register_initializer(keep)
    model.graph.inputs.append(keep)
    hidden = found.head.inputs[0]
    assert hidden is not None
    start = ir.node("Neg", [keep])
    start.outputs[0].shape, start.outputs[0].type = keep.shape, keep.type
    model.graph.insert_before(found.head, start)
    end, axis = (constant(model, found.head, array) for array in (_END, np.array([1])))
    last = ir.node("Slice", [hidden, start.outputs[0], end, axis])
    B, _, C = dims(hidden)
    last.outputs[0].shape, last.outputs[0].type = ir.Shape([B, None, C]), hidden.type
    model.graph.insert_before(found.head, last)
    found.head.replace_input_with(0, last.outputs[0])


RULE = Rule(name="last_token", match=match, refuse=refuse, rewrite=rewrite)
