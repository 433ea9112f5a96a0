"""Graph clean-up: from what the tracer wrote to the few nodes per layer that a runtime likes.

Every pass takes the model, changes it in place, and says the same as before; the proof
(validate.py) runs on the result, so none of them has to be trusted.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

# Results with more elements than this are not computed ahead: they would bloat the file.
_FOLD_LIMIT = 1024
_HEADS_FIRST = (0, 2, 1, 3)  # (B, T, H, D) <-> (B, H, T, D)


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
        if not readers or not all(_is_transpose(node, (1, 0)) for node in readers):
            continue
        assert weight.const_value is not None
        weight.const_value = _transposed(weight.const_value, weight.name)
        weight.shape = ir.Shape(weight.const_value.shape)
        for node in list(readers):
            _replace(model, node, weight)


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
        for axis, dim in enumerate(_dims(origin)):
            if isinstance(dim, str):
                sources.setdefault(dim, (origin, axis))
    for node in _nodes(model, "Shape"):
        value = node.inputs[0]
        assert value is not None
        start, end = _int(node, "start", 0), node.attributes.get("end")
        dims = _dims(value)
        if end is None or end.as_int() != start + 1 or not 0 <= start < len(dims):
            continue
        source = sources.get(str(dims[start]))
        if source is None or source[0] is value:
            continue
        origin, axis = source
        read = ir.node("Shape", [origin], {"start": axis, "end": axis + 1})
        model.graph.insert_before(node, read)
        _take_over(read.outputs[0], node.outputs[0])
        _replace(model, node, read.outputs[0])


def make_reshapes_constant(model: ir.Model) -> None:
    """Write target shapes as constants where 0 (keep) and one -1 (the rest) can express them."""
    for node in _nodes(model, "Reshape"):
        source, target = node.inputs
        assert source is not None
        assert target is not None
        if target.const_value is not None:
            continue
        shape = _constant_shape(_dims(source), _dims(node.outputs[0]))
        if shape is None:
            continue
        constant = ir.node("Constant", [], {"value": ir.tensor(np.array(shape, dtype=np.int64))})
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)


def keep_heads_last(model: ir.Model) -> None:
    """Feed attention as (B, T, H D), which it splits itself, instead of transposed (B, H, T, D).

    RotaryEmbedding, between the transposes and the attention, changes its form with it.
    """
    for node in _nodes(model, "Attention"):
        sources = [_heads_last(value) for value in node.inputs[:3]]
        outputs = node.outputs[0].consumers()
        if any(source is None for source in sources):
            continue
        if node.outputs[0].is_graph_output() or not all(
            _is_transpose(reader, _HEADS_FIRST) for reader in outputs
        ):
            continue
        q, k, v = (source for source in sources if source is not None)
        H, K = _dims(q)[2], _dims(k)[2]
        if not isinstance(H, int) or not isinstance(K, int):
            continue
        for index, source in enumerate((q, k, v)):
            node.replace_input_with(index, _flat_heads(model, node, index, source))
        node.attributes.add(ir.AttrInt64("q_num_heads", H))
        node.attributes.add(ir.AttrInt64("kv_num_heads", K))
        _restore_heads(model, node, [*_dims(q)])


def merge_reshapes(model: ir.Model) -> None:
    """Drop a Reshape that undoes another one."""
    for node in _nodes(model, "Reshape"):
        value = node.inputs[0]
        assert value is not None
        first = value.producer()
        if first is None or first.op_type != "Reshape":
            continue
        origin = first.inputs[0]
        assert origin is not None
        before, after = _dims(origin), _dims(node.outputs[0])
        if before and before == after and None not in before:  # two unknown sizes may differ
            _replace(model, node, origin)


def merge_constants(model: ir.Model) -> None:
    """Keep one of each axis, size and number; arrays of floats are weights and stay as they are."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
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
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    outputs = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        value.metadata_props.clear()


def name_presents(model: ir.Model) -> None:
    """Keep the cache's outputs where it is an input, read or not: onnxruntime insists on them."""
    for node in _nodes(model, "Attention"):
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


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type and not node.domain]


def _dims(value: ir.Value | None) -> tuple[int | str | None, ...]:
    """Sizes and symbols of a value; () where nothing is known (a scalar is never asked for)."""
    if value is None or value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _is_transpose(node: ir.Node, perm: tuple[int, ...]) -> bool:
    attribute = node.attributes.get("perm")
    return (
        node.op_type == "Transpose" and attribute is not None and tuple(attribute.as_ints()) == perm
    )


def _transposed(tensor: ir.TensorProtocol, name: str | None) -> ir.LazyTensor:
    """The transposed matrix, made when it is written, so that one at a time is held."""

    def make() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=name)

    rows, columns = tensor.shape.numpy()
    shape = ir.Shape((columns, rows))
    return ir.LazyTensor(make, dtype=tensor.dtype, shape=shape, name=name)


def _take_over(new: ir.Value, old: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type


def _replace(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Let `value` stand for the one output of `node`, and remove the node."""
    ir.convenience.replace_all_uses_with(
        node.outputs[0], value, replace_graph_outputs=node.outputs[0].is_graph_output()
    )
    model.graph.remove(node, safe=True)


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


def _heads_last(value: ir.Value | None) -> ir.Value | None:
    """x (B, T, H, D) where `value` is x transposed to (B, H, T, D), rotated or not; else None."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "RotaryEmbedding":
        if node.inputs[0] is None or len(node.outputs[0].uses()) != 1:
            return None
        node = node.inputs[0].producer()
    if node is None or not _is_transpose(node, _HEADS_FIRST):
        return None
    source = node.inputs[0]
    return source if len(_dims(source)) == 4 else None


def _flat_heads(model: ir.Model, attention: ir.Node, index: int, source: ir.Value) -> ir.Value:
    """The attention's input as (B, T, H D), made from `source` (B, T, H, D)."""
    old = attention.inputs[index]
    assert old is not None
    rotation = old.producer()
    assert rotation is not None
    B, T, H, D = _dims(source)
    assert isinstance(H, int)
    assert isinstance(D, int)
    flat = _reshape(model, attention, source, [0, 0, H * D], ir.Shape([B, T, H * D]))
    if rotation.op_type != "RotaryEmbedding":
        return flat
    attributes = {**rotation.attributes, "num_heads": ir.AttrInt64("num_heads", H)}
    rotated = ir.node("RotaryEmbedding", [flat, *rotation.inputs[1:]], attributes)
    _take_over(rotated.outputs[0], flat)
    model.graph.insert_before(attention, rotated)
    return rotated.outputs[0]


def _restore_heads(model: ir.Model, attention: ir.Node, dims: Sequence[int | str | None]) -> None:
    """Give the readers of the attention, which undid (B, H, T, D), their (B, T, H, D)."""
    out = attention.outputs[0]
    readers = list(out.consumers())
    B, T, H, _ = dims
    D = _dims(out)[3]
    assert isinstance(H, int)
    assert isinstance(D, int)
    out.shape = ir.Shape([B, T, H * D])
    for reader in readers:
        heads = _reshape(model, reader, out, [0, 0, H, D], ir.Shape([B, T, H, D]))
        _replace(model, reader, heads)


def _reshape(
    model: ir.Model, before: ir.Node, value: ir.Value, target: list[int], shape: ir.Shape
) -> ir.Value:
    constant = ir.node("Constant", [], {"value": ir.tensor(np.array(target, dtype=np.int64))})
    node = ir.node("Reshape", [value, constant.outputs[0]])
    node.outputs[0].shape, node.outputs[0].type = shape, value.type
    model.graph.insert_before(before, [constant, node])
    return node.outputs[0]
