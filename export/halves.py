"""The stage that keeps floats in 16 bits, save those that 16 bits are too few for.

Positions and what is computed from them stay in float32: an angle of 1000 radians, or a distance of
3000 tokens, has no float16. They are cast where they meet the hidden state. So do the logits, which
samplers read, and the scales of an int8 cache. Norms and softmax compute in float32 inside.
"""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from gptopt.export.notes import Notes

STAGE = "float16"
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LARGEST = 65504.0
# What a mask adds, far below any score but far enough from the end of the range that a score added
# to it stays finite: a row that sees no key must not become NaN.
_MASKED = -32752.0

# Float inputs that an operator takes in float32 only: (domain, operator) -> their places.
_SINGLE_INPUTS = {("com.microsoft", "GroupQueryAttention"): (12, 13)}  # k_scale, v_scale

# Operators that pass on what positions and masks are computed with; anything else is the model.
_ARITHMETIC = {
    "Abs", "Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos", "CumSum",
    "Div", "Exp", "Expand", "Flatten", "Floor", "Gather", "Identity", "Max", "Min", "Mod", "Mul",
    "Neg", "Pow", "Range", "Reciprocal", "Reshape", "Sin", "Slice", "Split", "Sqrt", "Squeeze",
    "Sub", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
}  # fmt: skip
_PIECE = 2**20  # elements that are rounded at once
_LARGE = 2**20  # elements; a constant beyond this is a weight, not a table of frequencies


def to_halves(model: ir.Model, notes: Notes) -> ir.Model:
    """Turn a float32 graph into float16, in place; returns the model.

    Integer inputs and the logits keep their types, the cache becomes float16.
    """
    graph = model.graph
    exact = _exact_values(graph)
    wanted: dict[ir.Value, ir.Value] = {}  # exact value -> its float16 form
    for given in graph.inputs:
        if given.dtype == _FLOAT:
            given.type = ir.TensorType(_HALF)  # a copied graph shares its types
    single = _single_weights(graph, exact)
    for node in list(graph):
        if _is_exact(node, exact):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or index in _SINGLE_INPUTS.get((node.domain, node.op_type), ()):
                continue
            if value in exact and value.dtype == _FLOAT:
                node.replace_input_with(index, _cast(graph, value, wanted))
            elif value.is_initializer() and value in single and value.dtype == _FLOAT:
                node.replace_input_with(index, _half_copy(graph, value, notes))
        for output in node.outputs:
            if output.dtype == _FLOAT:
                output.type = ir.TensorType(_HALF)
    for weight in list(graph.initializers.values()):
        if weight.dtype == _FLOAT and weight not in single:
            _halve(weight, notes)
    _restore_logits(graph)
    return model


def _exact_values(graph: ir.Graph) -> set[ir.Value]:
    """Float values that come from integers, masks and small constants alone."""
    exact: set[ir.Value] = set()
    for node in graph:
        if node.op_type not in _ARITHMETIC or node.domain not in ("", "ai.onnx"):
            continue
        floats = [value for value in node.inputs if value is not None and value.dtype == _FLOAT]
        if all(value in exact or _is_small_constant(value) for value in floats):
            exact.update(value for value in node.outputs if value.dtype == _FLOAT)
    return exact


def _is_exact(node: ir.Node, exact: set[ir.Value]) -> bool:
    return any(value in exact for value in node.outputs)


def _is_small_constant(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tensor.size <= _LARGE


def _single_weights(graph: ir.Graph, exact: set[ir.Value]) -> set[ir.Value]:
    """Initializers that some reader wants in float32."""
    found = set()
    for node in graph:
        places = _SINGLE_INPUTS.get((node.domain, node.op_type), ())
        for index, value in enumerate(node.inputs):
            if (
                value is not None
                and value.is_initializer()
                and (index in places or _is_exact(node, exact))
            ):
                found.add(value)
                _bound_masks(value)
    return found


def _bound_masks(value: ir.Value) -> None:
    """A mask's lowest float32 would be -inf as a float16."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != _FLOAT or tensor.size != 1:
        return
    array = tensor.numpy()
    if array < -_LARGEST:
        value.const_value = ir.Tensor(np.full_like(array, _MASKED), name=value.name)


def _cast(graph: ir.Graph, value: ir.Value, made: dict[ir.Value, ir.Value]) -> ir.Value:
    if value not in made:
        producer = value.producer()
        assert producer is not None
        node = ir.node("Cast", [value], {"to": int(_HALF)})
        out = node.outputs[0]
        out.shape, out.type, out.name = value.shape, ir.TensorType(_HALF), f"{value.name}.half"
        graph.insert_after(producer, node)
        made[value] = out
    return made[value]


def _half_copy(graph: ir.Graph, value: ir.Value, notes: Notes) -> ir.Value:
    """The float16 form of an initializer that others read in float32."""
    name = f"{value.name}.half"
    if name not in graph.initializers:
        copy = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(_FLOAT), const_value=value.const_value
        )
        graph.register_initializer(copy)
        _halve(copy, notes)
    return graph.initializers[name]


def _halve(value: ir.Value, notes: Notes) -> None:
    """Make an initializer float16, computed when it is written so that one at a time is held."""
    tensor, name = value.const_value, value.name or ""
    assert tensor is not None

    def make() -> ir.TensorProtocol:
        array = np.ascontiguousarray(tensor.numpy())
        halves = np.empty(array.shape, np.float16)
        source, target = array.reshape(-1), halves.reshape(-1)
        for start in range(0, array.size, _PIECE):  # what is in between stays small
            piece = source[start : start + _PIECE]
            if np.abs(piece).max() > _LARGEST:
                piece = np.clip(piece, -_LARGEST, _LARGEST)
                notes.add(STAGE, name, "clipped to +-65504", "float16 ends there")
            target[start : start + _PIECE] = piece
        return ir.Tensor(halves, name=name)

    value.const_value = ir.LazyTensor(
        make, dtype=_HALF, shape=ir.Shape(tensor.shape.numpy()), name=name
    )
    value.type = ir.TensorType(_HALF)


def _restore_logits(graph: ir.Graph) -> None:
    """Logits leave the graph in float32; the cache, which comes back in, does not."""
    for index, value in _outputs_outside_the_cache(graph):
        producer, name = value.producer(), value.name
        assert producer is not None
        node = ir.node("Cast", [value], {"to": int(_FLOAT)})
        out = node.outputs[0]
        out.shape, out.type = value.shape, ir.TensorType(_FLOAT)
        graph.append(node)
        graph.outputs[index] = out
        value.name, out.name = f"{name}.half", name


def _outputs_outside_the_cache(graph: ir.Graph) -> Iterable[tuple[int, ir.Value]]:
    for index, value in enumerate(graph.outputs):
        if value.dtype == _HALF and not (value.name or "").startswith("present"):
            yield index, value
