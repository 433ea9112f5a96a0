"""GroupQueryAttention turns queries and keys itself, by a stored table of every position.

Only where a row's cache holds no padding: the operator counts positions from the start of the
cache. The table is what the graph computes for the positions 0, 1, 2, ..., so not a bit differs.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from gptopt.export.graphs import MICROSOFT, dims, int_of, only_reader
from gptopt.export.rules.rule import Rule

BLOCK_SIZE = "block_size"  # in the graph's meta: how many positions the model has
_COS, _SIN = 7, 8  # inputs of GroupQueryAttention
_POSITIONS = "position_ids"


class Match(NamedTuple):
    """An attention whose queries and keys are turned by one table."""

    model: ir.Model
    attention: ir.Node
    query: ir.Node
    key: ir.Node


def match(model: ir.Model, node: ir.Node) -> Match | None:
    """GroupQueryAttention(RotaryEmbedding(q), RotaryEmbedding(k), v)."""
    if (node.op_type, node.domain) != ("GroupQueryAttention", MICROSOFT):
        return None
    query, key = (None if value is None else value.producer() for value in node.inputs[:2])
    if query is None or key is None or {query.op_type, key.op_type} != {"RotaryEmbedding"}:
        return None
    return Match(model, node, query, key)


def refuse(found: Match) -> str | None:
    """The operator has one table for both, half a head wide, for places counted from 0."""
    query, key, H = found.query, found.key, int_of(found.attention, "num_heads", 0)
    if list(query.inputs[1:]) != list(key.inputs[1:]):
        return "queries and keys are turned by different tables"
    width, R = dims(query.outputs[0])[-1], dims(query.inputs[2])[-1]
    D = width // H if isinstance(width, int) else 0
    if D % 16 or D // 2 != R:
        return f"it turns whole heads of a multiple of 16 channels, not {R} pairs of {D} channels"
    if any(only_reader(each.outputs[0]) is None for each in (query, key)):
        return "something else reads the turned queries or keys"
    if BLOCK_SIZE not in found.model.graph.meta:
        return "it is not known how many positions the model has"
    if _tables(found.model, query) is None:
        return "the angles depend on more than the positions"
    return None


def rewrite(model: ir.Model, found: Match) -> None:
    """The attention reads what was turned, and the table."""
    tables = _tables(model, found.query)
    assert tables is not None
    for place, node in enumerate((found.query, found.key)):
        found.attention.replace_input_with(place, node.inputs[0])
    if len(found.attention.inputs) <= _SIN:
        found.attention.resize_inputs(_SIN + 1)
    for place, value in zip((_COS, _SIN), tables, strict=True):
        found.attention.replace_input_with(place, value)
    interleaved = int_of(found.query, "interleaved", 0)
    found.attention.attributes.add(ir.AttrInt64("do_rotary", 1))
    found.attention.attributes.add(ir.AttrInt64("rotary_interleaved", interleaved))
    model.graph.remove([found.query, found.key], safe=True)


def _tables(model: ir.Model, rotary: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Cosines and sines (M, R) as initializers, one pair for all layers that share their angles."""
    key = "rotary of " + " ".join(value.name or "" for value in rotary.inputs[1:4] if value)
    if key not in model.graph.meta:
        arrays = _computed(model, rotary, int(model.graph.meta[BLOCK_SIZE]))
        model.graph.meta[key] = arrays and tuple(
            _stored(model, f"rotary.{name}", array)
            for name, array in zip(("cosines", "sines"), arrays, strict=True)
        )
    made: tuple[ir.Value, ir.Value] | None = model.graph.meta[key]
    return made


def _computed(model: ir.Model, rotary: ir.Node, size: int) -> list[npt.NDArray[np.float32]] | None:
    """What the rotation reads at the positions 0 to size; None where that is not all it needs."""
    import onnxruntime

    copy = model.clone()
    names = [value.name for value in rotary.inputs[1:4] if value is not None]
    made = {value.name: value for node in copy.graph for value in node.outputs}
    if not all(name in made for name in names):
        return None
    copy.graph.outputs[:] = [made[name] for name in names]
    common.RemoveUnusedNodesPass()(copy)
    used = [value for value in copy.graph.inputs if value.uses()]
    if {value.name for value in used} - {_POSITIONS, "input_ids"}:
        return None
    copy.graph.inputs[:] = used
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def at(positions: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
        feeds = {value.name: positions for value in used}
        numbers, *tables = session.run(names, feeds)
        return [table[numbers] for table in tables]  # (B, T, R)

    straight = [table[0] for table in at(np.arange(size)[None])]
    order = np.stack((np.arange(size)[::-1], np.roll(np.arange(size), 1)))
    turned = zip(straight, at(order), strict=True)
    return straight if all(np.array_equal(one[order], two) for one, two in turned) else None


def _stored(model: ir.Model, name: str, array: npt.NDArray[np.float32]) -> ir.Value:
    while name in model.graph.initializers:
        name += "_"
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


RULE = Rule(name="rotary_gqa", match=match, refuse=refuse, rewrite=rewrite)
