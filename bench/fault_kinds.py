"""The faults that bench/faults.py plants: each kind changes one node or says that it cannot."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from gptopt.export.counterparts import parameter_of
from gptopt.export.graphs import dims
from gptopt.export.steps import layer_of

_PRODUCTS = ("MatMul", "MatMulNBits")
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_ATTENTIONS = ("Attention", "GroupQueryAttention")

Plant = Callable[[ir.Model, ir.Node], bool | None]


def _layers(model: ir.Model) -> int:
    return (
        sum((value.name or "").startswith("past_key_values.") for value in model.graph.inputs) // 2
    )


def _stored(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    while value is not None and value.const_value is None:
        maker = value.producer()
        if maker is None or maker.op_type not in ("Transpose", "Cast"):
            return None
        value = maker.inputs[0]
    return value


def _store(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.shape = ir.Shape(array.shape)


def _change(node: ir.Node, index: int, change: Callable[[np.ndarray], np.ndarray]) -> bool:
    value = _stored(node, index)
    if value is None or value.const_value is None:
        return False
    _store(value, change(np.array(value.const_value.numpy())))
    return True


def _fresh(model: ir.Model, node: ir.Node, index: int, array: np.ndarray) -> None:
    """A tensor of its own in the place of an input."""
    constant = ir.node("Constant", [], {"value": ir.tensor(array)}, name=f"{node.name}.fault")
    model.graph.insert_before(node, constant)
    node.replace_input_with(index, constant.outputs[0])


def _before(
    model: ir.Model, node: ir.Node, index: int, kind: str, *others: ir.Value, **attributes: Any
) -> None:
    """Put a node in front of an input."""
    new = ir.node(kind, [node.inputs[index], *others], attributes, name=f"{node.name}.fault")
    model.graph.insert_before(node, new)
    node.replace_input_with(index, new.outputs[0])


def _swap(node: ir.Node, first: int, second: int) -> bool:
    a, b = node.inputs[first], node.inputs[second]
    if a is None or b is None:
        return False
    node.replace_input_with(first, b)
    node.replace_input_with(second, a)
    return True


def _is_stream(value: ir.Value | None) -> bool:
    return value is not None and not parameter_of(value) and len(dims(value)) == 3


def perturbed(model: ir.Model, node: ir.Node) -> bool:
    """One number of a weight."""

    def change(array: np.ndarray) -> np.ndarray:
        array[array.shape[0] // 2, 1] += 0.1 * np.abs(array).max()
        return array

    return node.op_type == "MatMul" and bool(parameter_of(node.inputs[1])) and _change(
        node, 1, change
    )  # fmt: skip


def transposed(model: ir.Model, node: ir.Node) -> bool:
    """A square weight turned, another one with its rows moved."""
    if node.op_type != "MatMul" or not parameter_of(node.inputs[1]):
        return False
    return _change(
        node, 1, lambda w: w.T if w.shape[0] == w.shape[1] else np.roll(w, 1, axis=0)
    )  # fmt: skip


def another_layers_weight(model: ir.Model, node: ir.Node) -> bool:
    """A product with the same matrix of another layer."""
    name = parameter_of(node.inputs[1]) if node.op_type in _PRODUCTS else ""
    layer = layer_of(name) if name else None
    if layer is None:
        return False
    other = name.replace(f".{layer}.", f".{(layer + 1) % _layers(model)}.")
    for index in range(1, len(node.inputs)):
        value = node.inputs[index]
        if value is not None and (value.name or "").startswith(name):
            twin = (value.name or "").replace(name, other)
            node.replace_input_with(index, model.graph.initializers[twin])
    return True


def bias_dropped(model: ir.Model, node: ir.Node) -> bool:
    """The bias of a product."""
    at = {"FastGelu": 1, "SkipLayerNormalization": 4, "MatMulNBits": 5}.get(node.op_type)
    if node.op_type == "Add":
        at = next((i for i in (0, 1) if parameter_of(node.inputs[i]).endswith("bias")), None)
        if at is not None:
            return _change(node, at, np.zeros_like)
    if at is None or len(node.inputs) <= at or node.inputs[at] is None:
        return False
    node.resize_inputs(at)
    while node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)
    return True


def epsilon(model: ir.Model, node: ir.Node) -> bool:
    """1e-2 for 1e-5."""
    if node.op_type not in (*_NORMS, *_SKIPS):
        return False
    node.attributes.add(ir.AttrFloat32("epsilon", 1e-2))
    return True


def norm_weight_ignored(model: ir.Model, node: ir.Node) -> bool:
    """Ones in its place."""
    at = 1 if node.op_type in _NORMS else 2 if node.op_type in _SKIPS else None
    if at is None or (value := _stored(node, at)) is None or value.const_value is None:
        return False
    _fresh(model, node, at, np.ones_like(value.const_value.numpy()))
    return True


def keys_and_values_swapped(model: ir.Model, node: ir.Node) -> bool:
    """Of the new tokens."""
    return node.op_type in _ATTENTIONS and _swap(node, 1, 2)


def past_swapped(model: ir.Model, node: ir.Node) -> bool:
    """Cached keys and values."""
    first = {"Attention": 4, "GroupQueryAttention": 3}.get(node.op_type)
    return first is not None and _swap(node, first, first + 1)


def another_layers_cache(model: ir.Model, node: ir.Node) -> bool:
    """Cached keys of another layer."""
    at = {"Attention": 4, "GroupQueryAttention": 3}.get(node.op_type)
    if at is None:
        return False
    names = {value.name: value for value in model.graph.inputs}
    layer = layer_of(getattr(node.inputs[at], "name", None) or "") or 0
    other = f"past_key_values.{(layer + 1) % _layers(model)}.key"
    node.replace_input_with(at, names[other])
    return True


def scale(model: ir.Model, node: ir.Node) -> bool:
    """One per cent off."""
    if node.op_type not in _ATTENTIONS:
        return False
    found = node.attributes["scale"].as_float()
    node.attributes.add(ir.AttrFloat32("scale", 1.01 * found))
    return True


def mask_removed(model: ir.Model, node: ir.Node) -> bool:
    """Nothing is hidden from this attention."""
    at = {"Attention": 3, "GroupQueryAttention": 10}.get(node.op_type)
    if at is None or len(node.inputs) <= at or node.inputs[at] is None:
        return False
    zero = ir.node("Constant", [], {"value": ir.tensor(np.float32(0))}, name=f"{node.name}.zero")
    model.graph.insert_before(node, zero)
    _before(model, node, at, "Mul", zero.outputs[0])
    return True


def tokens_miscounted(model: ir.Model, node: ir.Node) -> bool:
    """One cached token more."""
    if node.op_type != "GroupQueryAttention":
        return False
    one = ir.node("Constant", [], {"value": ir.tensor(np.int32(-1))}, name=f"{node.name}.one")
    model.graph.insert_before(node, one)
    _before(model, node, 5, "Add", one.outputs[0])
    zero = ir.node("Constant", [], {"value": ir.tensor(np.int32(0))}, name=f"{node.name}.zero")
    model.graph.insert_before(node, zero)
    floor = ir.node(
        "Max", [node.inputs[5], zero.outputs[0]], name=f"{node.name}.fault.floor"
    )  # fmt: skip
    model.graph.insert_before(node, floor)
    node.replace_input_with(5, floor.outputs[0])
    return True


def activation(model: ir.Model, node: ir.Node) -> bool:
    """erf for tanh; a hard sigmoid for a sigmoid."""
    if node.op_type == "Gelu":
        node.attributes.add(ir.AttrString("approximate", "none"))
    elif node.op_type == "FastGelu":
        node.op_type = "BiasGelu"
        return len(node.inputs) > 1
    elif node.op_type == "Sigmoid":
        node.op_type = "HardSigmoid"
    else:
        return False
    return True


def position(model: ir.Model, node: ir.Node) -> bool:
    """Off by one: learned ones by number, rotary ones by angle."""
    if node.op_type == "Gather" and parameter_of(node.inputs[0]).startswith("wpe"):
        number: Any = np.int64(1)
    elif node.op_type in ("Cos", "Sin"):
        number = np.float32(1)
    else:
        return False
    at = 1 if node.op_type == "Gather" else 0
    one = ir.node("Constant", [], {"value": ir.tensor(number)}, name=f"{node.name}.one")
    model.graph.insert_before(node, one)
    _before(model, node, at, "Add", one.outputs[0])
    return True


def rotary_pairs(model: ir.Model, node: ir.Node) -> bool:
    """The other way to pair channels."""
    if node.op_type != "RotaryEmbedding":
        return False
    node.attributes.add(ir.AttrInt64("interleaved", 1))
    return True


def residual_dropped(model: ir.Model, node: ir.Node) -> bool:
    """The stream is not added: what is added instead is zero."""
    if node.op_type not in ("Add", *_SKIPS) or not all(map(_is_stream, node.inputs[:2])):
        return False
    value = node.inputs[1]
    assert value is not None
    _before(model, node, 1, "Sub", value)
    return True


def wrong_addend(model: ir.Model, node: ir.Node) -> bool:
    """The embedding of the tokens is added instead of the stream."""
    if node.op_type not in ("Add", *_SKIPS) or not all(map(_is_stream, node.inputs[:2])):
        return False
    tokens = next(each for each in model.graph if each.op_type.startswith("Gather")).outputs[0]
    if tokens in node.inputs or tokens.name == "":
        return False
    node.replace_input_with(1, tokens)
    return True


def head_untied(model: ir.Model, node: ir.Node) -> bool:
    """A matrix of its own, one row of which differs."""
    matrix = node.inputs[1] if node.op_type == "MatMul" else None
    maker = None if matrix is None else matrix.producer()
    if maker is None or maker.op_type != "Transpose":
        return False
    value = _stored(node, 1)
    assert value is not None
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    array[7] *= 1.05
    _fresh(model, node, 1, np.ascontiguousarray(array.T))
    return True


def block_scale(model: ir.Model, node: ir.Node) -> bool:
    """Of one block of a quantised weight."""
    if node.op_type != "MatMulNBits":
        return False

    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[array.size // 2] *= 2
        return array

    return _change(node, 2, change)


def codes_moved(model: ir.Model, node: ir.Node) -> bool:
    """Two rows of a quantised weight changed places."""
    return node.op_type == "MatMulNBits" and _change(node, 1, lambda x: np.roll(x, 1, axis=0))


def cache_scale(model: ir.Model, node: ir.Node) -> bool:
    """Keys of an int8 cache clipped to a twentieth of their range."""
    return node.op_type == "GroupQueryAttention" and _change(node, 12, lambda scale: scale / 20)


KINDS: dict[str, Plant] = {
    plant.__name__.replace("_", " "): plant
    for plant in (
        perturbed, transposed, another_layers_weight, bias_dropped, epsilon, norm_weight_ignored,
        keys_and_values_swapped, past_swapped, another_layers_cache, scale, mask_removed,
        tokens_miscounted, activation, position, rotary_pairs, residual_dropped, wrong_addend,
        head_untied, block_scale, codes_moved, cache_scale,
    )
}  # fmt: skip
IN_WEIGHTS = ("perturbed", "transposed", "block scale", "codes moved", "cache scale")


def readers_of_weights(node: ir.Node) -> tuple[str, ...]:
    """All nodes that read a stored tensor which a node reads."""
    stored = (_stored(node, index) for index in range(1, len(node.inputs)))
    return tuple(each.name or "" for value in stored if value for each in value.consumers())
