"""Gelu with the bias before it as FastGelu (tanh) or BiasGelu (erf): the two are never mixed.

They differ by up to 5e-4, which no comparison of tokens shows.
"""

from typing import NamedTuple

import onnx_ir as ir

from gptopt.export.graphs import MICROSOFT, constant_of, dims, only_reader, replace_node, take_over
from gptopt.export.rules.rule import Rule


class Match(NamedTuple):
    """gelu(x [+ bias])."""

    gelu: ir.Node
    tanh: bool
    x: ir.Value
    bias: ir.Value | None


def match(model: ir.Model, node: ir.Node) -> Match | None:
    """tanh-GELU, biased or not, or a biased erf-GELU; erf-GELU alone stays a standard Gelu."""
    if node.op_type != "Gelu" or node.domain or node.inputs[0] is None:
        return None
    kind = node.attributes.get("approximate")
    tanh = kind is not None and kind.as_string() == "tanh"
    x, bias = _split(node.inputs[0])
    return Match(node, tanh, x, bias) if tanh or bias is not None else None


def refuse(found: Match) -> str | None:
    """Both kernels take whatever was matched."""
    return None


def rewrite(model: ir.Model, found: Match) -> None:
    """One node; the Add before it goes when nobody reads it."""
    inputs = [found.x] if found.bias is None else [found.x, found.bias]
    new = ir.node("FastGelu" if found.tanh else "BiasGelu", inputs, domain=MICROSOFT)
    take_over(new.outputs[0], found.gelu.outputs[0])
    model.graph.insert_before(found.gelu, new)
    sums = found.gelu.inputs[0]
    replace_node(model, found.gelu, new.outputs[0])
    add = None if sums is None or found.bias is None else sums.producer()
    if add is not None:
        model.graph.remove(add, safe=True)


def _split(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(x, bias) of a value x + bias that nobody else reads; (value, None) of any other."""
    add = value.producer()
    if add is None or add.op_type != "Add" or only_reader(value) is None:
        return value, None
    for index in (0, 1):
        bias, x = add.inputs[index], add.inputs[1 - index]
        tensor = constant_of(bias)
        if x is None or tensor is None or len(tensor.shape) != 1:
            continue
        if dims(x)[-1:] == (tensor.shape[0],):
            return x, bias
    return value, None


RULE = Rule(name="bias_gelu", match=match, refuse=refuse, rewrite=rewrite)
