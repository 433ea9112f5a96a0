"""Attention fed with (B, T, H D), which it splits itself, instead of transposed (B, H, T, D).

RotaryEmbedding, between the transposes and the attention, changes its form with it. The standard
Attention reads either form, and keeps the one it has where the transposes are not there;
GroupQueryAttention reads only the flat one, and gets transposes of its own.
"""

import onnx_ir as ir

from gptopt.export.graphs import (
    MICROSOFT,
    dims,
    is_transpose,
    nodes_of,
    replace_node,
    reshape,
    take_over,
    transpose,
)

_HEADS_FIRST = (0, 2, 1, 3)  # (B, T, H, D) <-> (B, H, T, D)


def keep_heads_last(model: ir.Model) -> None:
    """Let every attention read and write (B, T, H D) where it can, or must."""
    for node in nodes_of(model, "GroupQueryAttention", MICROSOFT):
        sources = [_heads_last(value) or _swapped(model, node, value) for value in node.inputs[:3]]
        _flatten(model, node, sources)
    for node in nodes_of(model, "Attention"):
        sources = [x for x in map(_heads_last, node.inputs[:3]) if x is not None]
        if len(sources) < 3 or not _is_undone(node):
            continue
        H, K = dims(sources[0])[2], dims(sources[1])[2]
        if isinstance(H, int) and isinstance(K, int):
            _flatten(model, node, sources)
            node.attributes.add(ir.AttrInt64("q_num_heads", H))
            node.attributes.add(ir.AttrInt64("kv_num_heads", K))


def _is_undone(attention: ir.Node) -> bool:
    """Whether all that reads the attention transposes it first."""
    out = attention.outputs[0]
    return not out.is_graph_output() and all(
        is_transpose(reader, _HEADS_FIRST) for reader in out.consumers()
    )


def _flatten(model: ir.Model, node: ir.Node, sources: list[ir.Value]) -> None:
    """Feed an attention from q, k, v (B, T, H, D), and give its readers (B, T, H, D)."""
    B, T, H, _ = dims(sources[0])
    D = dims(sources[2])[3]
    for index, source in enumerate(sources):
        node.replace_input_with(index, _flat_heads(model, node, index, source))
    _restore_heads(model, node, [B, T, H, D])


def _heads_last(value: ir.Value | None) -> ir.Value | None:
    """x (B, T, H, D) where `value` is x transposed to (B, H, T, D), rotated or not; else None."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "RotaryEmbedding":
        if node.inputs[0] is None or len(node.outputs[0].uses()) != 1:
            return None
        node = node.inputs[0].producer()
    if node is None or not is_transpose(node, _HEADS_FIRST):
        return None
    source = node.inputs[0]
    return source if len(dims(source)) == 4 else None


def _swapped(model: ir.Model, attention: ir.Node, value: ir.Value | None) -> ir.Value:
    """x (B, T, H, D) made of a value (B, H, T, D), which may be anything."""
    assert value is not None
    return transpose(model, attention, value, _HEADS_FIRST)


def _flat_heads(model: ir.Model, attention: ir.Node, index: int, source: ir.Value) -> ir.Value:
    """The attention's input as (B, T, H D), made from `source` (B, T, H, D)."""
    old = attention.inputs[index]
    assert old is not None
    rotation = old.producer()
    B, T, H, D = dims(source)
    assert isinstance(H, int)
    assert isinstance(D, int)
    flat = reshape(model, attention, source, [0, 0, H * D], ir.Shape([B, T, H * D]))
    swapped = source.producer()
    if rotation is None or rotation.op_type != "RotaryEmbedding":
        return flat
    if swapped is not None and old in swapped.inputs:  # rotated already
        return flat
    attributes = {**rotation.attributes, "num_heads": ir.AttrInt64("num_heads", H)}
    rotated = ir.node(
        "RotaryEmbedding", [flat, *rotation.inputs[1:]], attributes, domain=rotation.domain
    )
    take_over(rotated.outputs[0], flat)
    model.graph.insert_before(attention, rotated)
    return rotated.outputs[0]


def _restore_heads(model: ir.Model, attention: ir.Node, shape: list[int | str | None]) -> None:
    """Give the readers of the attention, who know (B, H, T, D), what they know."""
    B, T, H, D = shape
    assert isinstance(H, int)
    assert isinstance(D, int)
    out = attention.outputs[0]
    readers, undone = [(use.node, use.idx) for use in out.uses()], _is_undone(attention)
    was_output = out.is_graph_output()
    out.shape = ir.Shape([B, T, H * D])
    if undone:
        for reader, _ in readers:
            heads = reshape(model, reader, out, [0, 0, H, D], ir.Shape([B, T, H, D]))
            replace_node(model, reader, heads)
        return
    assert not was_output
    first = next(node for node in model.graph if node in {reader for reader, _ in readers})
    heads = reshape(model, first, out, [0, 0, H, D], ir.Shape([B, T, H, D]))
    swapped = transpose(model, first, heads, _HEADS_FIRST)
    for reader, index in readers:
        reader.replace_input_with(index, swapped)
