"""Which steps of a model the values of a graph are, told from the parameters that nodes read."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import onnx_ir as ir

from gptopt.export.graphs import MICROSOFT, constant_of
from gptopt.export.lookups import lookup_table
from gptopt.export.steps import Key

LENGTHS = ("last tokens", "total length")

_PRODUCTS = ("MatMul", "MatMulNBits", "DynamicQuantizeMatMul")
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_PASSED_ON = ("Transpose", "Cast", "Identity", "Mul")  # on the way from a stored weight
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_GELUS = ("FastGelu", "BiasGelu", "Gelu", "Relu")
_BIAS_AT = {"MatMulNBits": 5, "DynamicQuantizeMatMul": 4}
_ADD_NOTHING = ("Split", *_PRODUCTS, "Attention", "GroupQueryAttention", "RotaryEmbedding")
_STORED = re.compile(r"\.(codes|rows)$")
_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


class Check(NamedTuple):
    """A value of the graph and the step that it should be.

    Attributes:
        value: None where the node lacks an input.
        key: of the step.
        node: by which the step was recognised.
    """

    value: ir.Value | None
    key: Key
    node: ir.Node


def output_key(name: str) -> Key | None:
    """The step that an output of the graph is."""
    found = _CACHE.fullmatch(name)
    if found:
        return f"present {found[3]}", found[2]
    return ("logits", "") if name == "logits" else None


def checks_of(node: ir.Node) -> Iterator[Check]:
    """What a node reads and writes that a model knows too, inputs first."""
    kind, inputs, outputs = node.op_type, list(node.inputs), list(node.outputs)
    if kind in _PRODUCTS:
        yield from _product(node)
    elif name := lookup_table(node) or _looked_up(node):
        yield Check(outputs[0], ("look-up", name), node)
    elif kind == "Add":
        for value, other in (inputs, inputs[::-1]):
            if parameter_of(other) and (name := _made_by(value)):
                yield Check(outputs[0], ("sum", name), node)
    elif kind in _NORMS and (name := parameter_of(inputs[1])):
        yield Check(inputs[0], ("stream", name), node)
        yield Check(outputs[0], ("norm", name), node)
    elif kind in _SKIPS and (name := parameter_of(inputs[2])):
        if len(outputs) > 3 and outputs[3].name:
            yield Check(outputs[3], ("stream", name), node)
        yield Check(outputs[0], ("norm", name), node)
    elif kind in _GELUS and (name := _made_by(inputs[0])):
        if not any(reader.op_type == "Mul" for reader in outputs[0].consumers()):  # gated
            yield Check(outputs[0], ("activation", name), node)
    elif kind in ("Attention", "GroupQueryAttention"):
        yield from _attention(node)


def _looked_up(node: ir.Node) -> str:
    """The parameter whose rows a node takes; codes that are yet to be unpacked are none."""
    rows = node.inputs[0] if node.op_type in _LOOKUPS else None
    codes = node.op_type == "Gather" and rows is not None and rows.dtype == ir.DataType.UINT8
    return "" if codes else parameter_of(rows)


def _product(node: ir.Node) -> Iterator[Check]:
    name = parameter_of(node.inputs[1])
    if not name:
        return
    at = _BIAS_AT.get(node.op_type, len(node.inputs))
    biased = len(node.inputs) > at and node.inputs[at] is not None
    readers = node.outputs[0].consumers()
    # Where nothing that reads it could add a bias, it has to be in the result.
    biased |= bool(readers) and all(each.op_type in _ADD_NOTHING for each in readers)
    yield Check(node.inputs[0], ("input", name), node)
    yield Check(node.outputs[0], ("sum" if biased else "product", name), node)


def _attention(node: ir.Node) -> Iterator[Check]:
    past = (value for value in node.inputs if value is not None and value.name)
    found = next((m for value in past if (m := _CACHE.fullmatch(value.name or ""))), None)
    number = found[2] if found else _number(node)
    # A cache that is another layer's is no sign of the layer: its present is.
    for output in node.outputs[1:3]:
        if output.name and (told := _CACHE.fullmatch(output.name)):
            number = told[2]
    gqa = node.domain == MICROSOFT
    inputs = [*node.inputs, *[None] * 11]
    inputs[1:3] = [_written(value) for value in inputs[1:3]]
    for part, value in zip("qkv", inputs[:3], strict=True):
        if value is None or inputs[1] is None:  # packed
            continue
        rotary = value.producer()
        if part in "qk" and rotary is not None and rotary.op_type == "RotaryEmbedding":
            yield Check(rotary.inputs[0], (f"unrotated {part}", number), rotary)
            first = 2 if rotary.domain == MICROSOFT else 1
            yield Check(rotary.inputs[first], ("cosines", number), rotary)
            yield Check(rotary.inputs[first + 1], ("sines", number), rotary)
        turns = part in "qk" and "do_rotary" in node.attributes
        yield Check(value, (f"unrotated {part}" if turns else part, number), node)
    if gqa:
        yield Check(inputs[5], ("last tokens", number), node)
        yield Check(inputs[6], ("total length", number), node)
    yield Check(inputs[10 if gqa else 3], ("mask", number), node)
    yield Check(node.outputs[0], ("attention", number), node)


def _written(value: ir.Value | None) -> ir.Value | None:
    """The new keys or values, where a static cache is cut for the attention."""
    cut = None if value is None else value.producer()
    if cut is None or cut.op_type != "Slice" or cut.inputs[0] is None:
        return value
    scatter = cut.inputs[0].producer()
    return value if scatter is None or scatter.op_type != "TensorScatter" else scatter.inputs[1]


def _number(node: ir.Node) -> str:
    """How many attentions come before this one."""
    graph = node.graph
    assert graph is not None
    before = 0
    for each in graph:
        if each is node:
            break
        before += each.op_type == node.op_type
    return str(before)


def parameter_of(value: ir.Value | None) -> str:
    """The parameter that a value holds, quantised or transposed perhaps; "" for none."""
    while value is not None and constant_of(value) is None:
        node = value.producer()
        if node is None or node.op_type not in _PASSED_ON:
            return ""
        value = node.inputs[0]
    return "" if value is None else _STORED.sub("", value.name or "")


def reader_of(value: ir.Value) -> ir.Node | None:
    """The first node that computes with a stored tensor."""
    for node in value.consumers():
        if node.op_type not in ("Transpose", "Cast", "Identity"):
            return node
        return reader_of(node.outputs[0])
    return None


def _made_by(value: ir.Value | None) -> str:
    """The weight of the product that made a value, biased or not; "" for none."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add":
        parts = [each for each in node.inputs if not parameter_of(each)]
        node = parts[0].producer() if len(parts) == 1 and parts[0] is not None else None
    if node is None or node.op_type not in _PRODUCTS:
        return ""
    return parameter_of(node.inputs[1])
