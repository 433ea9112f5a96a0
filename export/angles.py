"""Cosines and sines of positions from tables, for runtimes whose own are coarse.

WebGPU promises them to 2^-11 only, and within half a turn of zero (WGSL, "Accuracy of Built-in
Functions"): rotated keys of far positions would be others than the model was trained with.
"""

import numpy as np
import onnx_ir as ir

from gptopt.export.graphs import constant_of, replace_node, take_over

_TURNS = {"Cos": np.cos, "Sin": np.sin}
_POSITIONS = "position_ids"


def tabulate_angles(model: ir.Model, positions: int) -> None:
    """Replace Cos and Sin of position * frequency by rows of tables, in place.

    Args:
        model: a clean float32 graph.
        positions: how many there are.
    """
    graph = model.graph
    given = next(value for value in graph.inputs if value.name == _POSITIONS)
    for node in list(graph):
        frequencies = _frequencies(node)
        if frequencies is None:
            continue
        angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
        held = ir.tensor(_TURNS[node.op_type](angles), name=f"{node.outputs[0].name}.table")
        table = ir.Value(
            name=held.name, shape=ir.Shape(angles.shape), type=ir.TensorType(held.dtype),
            const_value=held,
        )  # fmt: skip
        graph.register_initializer(table)
        rows = ir.node("Gather", [table, given], {"axis": 0})
        take_over(rows.outputs[0], node.outputs[0])
        graph.insert_before(node, rows)
        replace_node(model, node, rows.outputs[0])


def _frequencies(node: ir.Node) -> np.ndarray | None:
    """What positions are multiplied with below a Cos or Sin, (R,); None where it is not that."""
    product = node.inputs[0].producer() if node.op_type in _TURNS and node.inputs[0] else None
    if product is None or product.op_type != "Mul":
        return None
    for counted, other in (product.inputs, product.inputs[::-1]):
        tensor = constant_of(other)
        if tensor is not None and len(tensor.shape) == 1 and _counts(counted):
            return np.asarray(tensor.numpy(), np.float32)
    return None


def _counts(value: ir.Value | None) -> bool:
    """Whether a value is the position ids in another type, with one more axis."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Cast", "Unsqueeze"):
            return False
        value = node.inputs[0]
    return value is not None and value.name == _POSITIONS
