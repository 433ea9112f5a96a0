"""Small tools for reading and changing an onnx_ir graph, for passes and rules."""

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"

Dim = int | str | None


def nodes_of(model: ir.Model, op_type: str, domain: str = "") -> list[ir.Node]:
    """The nodes of one operator, in order."""
    return [node for node in model.graph if (node.op_type, node.domain) == (op_type, domain)]


def dims(value: ir.Value | None) -> tuple[Dim, ...]:
    """Sizes and symbols of a value; () where nothing is known (a scalar is never asked for)."""
    if value is None or value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def int_of(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def is_transpose(node: ir.Node, perm: tuple[int, ...]) -> bool:
    """Whether a node permutes the axes like this."""
    attribute = node.attributes.get("perm")
    return (
        node.op_type == "Transpose" and attribute is not None and tuple(attribute.as_ints()) == perm
    )


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, where it is the only one and reads it once."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What a value is, where the graph itself says it and no client can override it."""
    if value is None or value.is_graph_input():
        return None
    return value.const_value


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Shape and type of one value for another."""
    new.shape, new.type = old.shape, old.type


def replace_node(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Let `value` stand for the one output of `node`, and remove the node."""
    ir.convenience.replace_all_uses_with(
        node.outputs[0], value, replace_graph_outputs=node.outputs[0].is_graph_output()
    )
    model.graph.remove(node, safe=True)


def constant(model: ir.Model, before: ir.Node, array: np.ndarray) -> ir.Value:
    """A constant in front of a node."""
    node = ir.node("Constant", [], {"value": ir.tensor(array)})
    model.graph.insert_before(before, node)
    return node.outputs[0]


def reshape(
    model: ir.Model, before: ir.Node, value: ir.Value, target: list[int], shape: ir.Shape
) -> ir.Value:
    """`value` in another shape, in front of a node; `target` is as Reshape reads it."""
    numbers = constant(model, before, np.array(target, dtype=np.int64))
    node = ir.node("Reshape", [value, numbers])
    node.outputs[0].shape, node.outputs[0].type = shape, value.type
    model.graph.insert_before(before, node)
    return node.outputs[0]


def transpose(model: ir.Model, before: ir.Node, value: ir.Value, perm: tuple[int, ...]) -> ir.Value:
    """`value` with its axes permuted, in front of a node."""
    node = ir.node("Transpose", [value], {"perm": perm})
    old = dims(value)
    node.outputs[0].shape, node.outputs[0].type = ir.Shape([old[i] for i in perm]), value.type
    model.graph.insert_before(before, node)
    return node.outputs[0]
