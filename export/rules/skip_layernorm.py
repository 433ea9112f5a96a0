"""Add and a normalization as SkipLayerNormalization or SkipSimplifiedLayerNormalization.

The bias of the linear layer that made one of the summands goes along.
"""

from typing import NamedTuple

import onnx_ir as ir

from gptopt.export.graphs import MICROSOFT, constant_of, dims, int_of, only_reader
from gptopt.export.rules.rule import Rule

_FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}


class Match(NamedTuple):
    """norm(x [+ bias] + skip)."""

    norm: ir.Node
    add: ir.Node


def match(model: ir.Model, node: ir.Node) -> Match | None:
    """A normalization of a sum of two tensors."""
    if node.domain or node.op_type not in _FUSED or node.inputs[0] is None:
        return None
    add = node.inputs[0].producer()
    if add is None or add.op_type != "Add" or any(len(dims(each)) == 1 for each in add.inputs):
        return None  # what a bias is added to is no sum of two streams
    return Match(node, add)


def refuse(found: Match) -> str | None:
    """The operator sums two (B, T, C) and normalizes C with a stored weight."""
    a, b = (dims(value) for value in found.add.inputs)
    if len(a) != 3 or a != b or None in a:
        return f"the summands are {list(a)} and {list(b)}, not two tensors (B, T, C) of one shape"
    if int_of(found.norm, "axis", -1) not in (-1, 2):
        return "it normalizes more than the last axis"
    if any(output.uses() for output in found.norm.outputs[1:]):
        return "the model reads the norm's statistics"
    weights = [value for value in found.norm.inputs[1:] if value is not None]
    if any(constant_of(value) is None or dims(value) != (a[2],) for value in weights):
        return "the norm's weight is not a stored vector"
    return None


def rewrite(model: ir.Model, found: Match) -> None:
    """One node, whose fourth output is the sum, for whoever reads it."""
    norm, add = found
    x, skip, bias = _operands(add)
    gamma, *beta = norm.inputs[1:]
    kind = _FUSED[norm.op_type]
    inputs = [x, skip, gamma]
    if kind == "SkipLayerNormalization":
        inputs.append(beta[0] if beta else None)
    inputs.append(bias)
    while inputs[-1] is None:
        inputs.pop()
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    total = add.outputs[0]
    is_read = total.is_graph_output() or any(node is not norm for node in total.consumers())
    new = ir.node(
        kind, inputs, {"epsilon": epsilon}, domain=MICROSOFT, num_outputs=4 if is_read else 1
    )
    pairs = [(norm.outputs[0], new.outputs[0])] + [(total, new.outputs[-1])] * is_read
    model.graph.insert_before(add, new)
    names = [old.name for old, _ in pairs]
    for old, value in pairs:
        value.shape, value.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(
            old, value, replace_graph_outputs=old.is_graph_output()
        )
    model.graph.remove([norm, add], safe=True)
    for (old, value), name in zip(pairs, names, strict=True):
        old.name, value.name = None, name
    for output in new.outputs[1:3]:  # not computed
        output.name = ""


def _operands(add: ir.Node) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """(x, skip, bias): x is what a linear layer wrote before its bias, where there is one."""
    for index in (0, 1):
        value, other = add.inputs[index], add.inputs[1 - index]
        inner = None if value is None else value.producer()
        if value is None or inner is None or inner.op_type != "Add" or only_reader(value) is None:
            continue
        for at in (0, 1):
            bias, x = inner.inputs[at], inner.inputs[1 - at]
            tensor = constant_of(bias)
            if tensor is not None and len(tensor.shape) == 1 and len(dims(x)) == 3:
                return x, other, bias
    return add.inputs[0], add.inputs[1], None


RULE = Rule(name="skip_layernorm", match=match, refuse=refuse, rewrite=rewrite)
