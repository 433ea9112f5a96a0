"""q, k and v that one product made are fed to GroupQueryAttention as one tensor, uncut."""

from typing import NamedTuple

import onnx_ir as ir

from gptopt.export.graphs import MICROSOFT, dims, int_of, only_reader
from gptopt.export.rules.rule import Rule


class Match(NamedTuple):
    """An attention that reads the three parts of one tensor."""

    attention: ir.Node
    split: ir.Node


def match(model: ir.Model, node: ir.Node) -> Match | None:
    """GroupQueryAttention(*Split(x))."""
    if (node.op_type, node.domain) != ("GroupQueryAttention", MICROSOFT):
        return None
    parts = list(node.inputs[:3])
    split = None if parts[0] is None else parts[0].producer()
    if split is None or split.op_type != "Split" or parts != list(split.outputs):
        return None
    return Match(node, split)


def refuse(found: Match) -> str | None:
    """The parts must lie as the operator cuts them, and nobody else may read them."""
    H, K = (int_of(found.attention, name, 0) for name in ("num_heads", "kv_num_heads"))
    widths = [dims(part)[-1] for part in found.split.outputs]
    width = widths[0] if isinstance(widths[0], int) else 0
    D = width // H
    if widths != [H * D, K * D, K * D]:
        return f"the parts are {widths} wide, not H D, K D, K D"
    if int_of(found.split, "axis", 0) not in (-1, 2):
        return "the parts do not lie side by side in the last axis"
    if any(only_reader(part) is None for part in found.split.outputs):
        return "something else reads the queries, keys or values"
    return None


def rewrite(model: ir.Model, found: Match) -> None:
    """The attention reads what was cut."""
    found.attention.replace_input_with(0, found.split.inputs[0])
    found.attention.replace_input_with(1, None)
    found.attention.replace_input_with(2, None)
    model.graph.remove(found.split, safe=True)


RULE = Rule(name="packed_qkv", match=match, refuse=refuse, rewrite=rewrite)
