"""Graph clean-up: from what the tracer wrote to the few nodes per layer that a runtime likes.

Every pass takes the model, changes it in place, and says the same as before; the proof
(validate.py) runs on the result, so none of them has to be trusted.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from gptopt.export.graphs import (
    MICROSOFT,
    dims,
    int_of,
    is_transpose,
    nodes_of,
    replace_node,
    take_over,
)
from gptopt.export.heads import keep_heads_last

# Results with more elements than this are not computed ahead: they would bloat the file.
_FOLD_LIMIT = 1024


def clean(model: ir.Model) -> ir.Model:
    """Run all passes, in the order in which each makes room for the next; returns the model."""
    for run in PASSES:
        run(model)
    return model


def fold_weight_transposes(model: ir.Model) -> None:
    """Store each linear layer's weight as MatMul wants it, under the parameter's own name.

    A weight that something else reads as well (a tied head) keeps its Transpose node, so that one
    copy is stored; runtimes compute that node once, when they load the file.
    """
    for weight in list(model.graph.initializers.values()):
        readers = weight.consumers()
        if not readers or not all(is_transpose(node, (1, 0)) for node in readers):
            continue
        assert weight.const_value is not None
        weight.const_value = _transposed(weight.const_value, weight.name)
        weight.shape = ir.Shape(weight.const_value.shape)
        for node in list(readers):
            replace_node(model, node, weight)


def fold_constants(model: ir.Model) -> None:
    """Compute small constant expressions ahead and simplify shape arithmetic."""
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_FOLD_LIMIT,
        output_size_limit=_FOLD_LIMIT,
    )
    common.RemoveUnusedNodesPass()(model)


def read_shapes_from_inputs(model: ir.Model) -> None:
    """Read symbolic sizes off the graph's inputs: equal sizes are then one node for all layers."""
    sources: dict[str, tuple[ir.Value, int]] = {}
    for origin in model.graph.inputs:
        for axis, dim in enumerate(dims(origin)):
            if isinstance(dim, str):
                sources.setdefault(dim, (origin, axis))
    for node in nodes_of(model, "Shape"):
        value = node.inputs[0]
        assert value is not None
        start, end = int_of(node, "start", 0), node.attributes.get("end")
        sizes = dims(value)
        if end is None or end.as_int() != start + 1 or not 0 <= start < len(sizes):
            continue
        source = sources.get(str(sizes[start]))
        if source is None or source[0] is value:
            continue
        origin, axis = source
        read = ir.node("Shape", [origin], {"start": axis, "end": axis + 1})
        model.graph.insert_before(node, read)
        take_over(read.outputs[0], node.outputs[0])
        replace_node(model, node, read.outputs[0])


def make_reshapes_constant(model: ir.Model) -> None:
    """Write target shapes as constants where 0 (keep) and one -1 (the rest) can express them."""
    for node in nodes_of(model, "Reshape"):
        source, target = node.inputs
        assert source is not None
        assert target is not None
        if target.const_value is not None:
            continue
        shape = _constant_shape(dims(source), dims(node.outputs[0]))
        if shape is None:
            continue
        constant = ir.node("Constant", [], {"value": ir.tensor(np.array(shape, dtype=np.int64))})
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)


def merge_reshapes(model: ir.Model) -> None:
    """Drop a Reshape that undoes another one."""
    for node in nodes_of(model, "Reshape"):
        value = node.inputs[0]
        assert value is not None
        first = value.producer()
        if first is None or first.op_type != "Reshape":
            continue
        origin = first.inputs[0]
        assert origin is not None
        before, after = dims(origin), dims(node.outputs[0])
        if before and before == after and None not in before:  # two unknown sizes may differ
            replace_node(model, node, origin)


def merge_constants(model: ir.Model) -> None:
    """Keep one of each axis, size and number; arrays of floats are weights and stay as they are."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        if value.is_graph_input():  # a default, which clients override
            continue
        if tensor.size > _FOLD_LIMIT or (tensor.dtype.is_floating_point() and tensor.shape):
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del model.graph.initializers[value.name or ""]


def share_subexpressions(model: ir.Model) -> None:
    """Compute the mask, the rotary tables and the sizes once for all layers."""
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def strip(model: ir.Model) -> None:
    """Remove what nobody reads, and what the tracer noted for itself, such as source lines."""
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    outputs = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        value.metadata_props.clear()


def name_presents(model: ir.Model) -> None:
    """Keep the cache's outputs where it is an input, read or not: onnxruntime insists on them."""
    attentions = (
        *nodes_of(model, "Attention"),
        *nodes_of(model, "GroupQueryAttention", MICROSOFT),
    )
    for node in attentions:
        if len(node.inputs) > 4 and node.inputs[4] is not None:
            node.resize_outputs(max(3, len(node.outputs)))
            for output, part in zip(node.outputs[1:3], ("key", "value"), strict=True):
                output.name = output.name or f"{node.outputs[0].name}.{part}"


PASSES: Sequence[Callable[[ir.Model], None]] = (
    fold_weight_transposes,
    read_shapes_from_inputs,
    share_subexpressions,  # before folding gives equal constants of several layers several names
    fold_constants,
    make_reshapes_constant,
    keep_heads_last,
    merge_reshapes,
    merge_constants,
    share_subexpressions,
    strip,
    name_presents,
)


def _transposed(tensor: ir.TensorProtocol, name: str | None) -> ir.LazyTensor:
    """The transposed matrix, made when it is written, so that one at a time is held."""

    def make() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=name)

    rows, columns = tensor.shape.numpy()
    shape = ir.Shape((columns, rows))
    return ir.LazyTensor(make, dtype=tensor.dtype, shape=shape, name=name)


def _constant_shape(
    source: Iterable[int | str | None], target: Iterable[int | str | None]
) -> list[int] | None:
    """A Reshape target without symbols, or None where 0 and one -1 do not suffice."""
    known, wanted = list(source), list(target)
    if not wanted:
        return None
    shape: list[int] = []
    for axis, dim in enumerate(wanted):
        if isinstance(dim, int):
            shape.append(dim)
        elif dim is not None and axis < len(known) and known[axis] == dim:
            shape.append(0)
        else:
            shape.append(-1)
    # A size of 0 is a real size only in shapes that no model of text has.
    return shape if shape.count(-1) <= 1 else None
