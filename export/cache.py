"""The stage that keeps the cache in int8, with scales from what a text has put into it."""

from collections.abc import Sequence
from typing import Literal

import onnx_ir as ir
from torch import Tensor

from gptopt.errors import UserError
from gptopt.export.notes import Notes
from gptopt.kernels.quantization import cache_scale

STAGE = "int8 cache"
_PAST_KEY, _PAST_VALUE, _KEY_SCALE, _VALUE_SCALE = 3, 4, 12, 13  # GroupQueryAttention's inputs


def quantize_cache(
    model: ir.Model,
    ranges: Sequence[tuple[Tensor, Tensor]],
    notes: Notes,
    *,
    per: Literal["channel", "tensor"] = "channel",
) -> ir.Model:
    """A copy of a graph whose past and present keys and values are int8; weights are shared.

    Only GroupQueryAttention on the CPU (and in onnxruntime-genai) reads such a cache. A runtime
    binds int8 buffers of the same shapes and need not know the scales.

    Args:
        model: a graph with one GroupQueryAttention per layer, its cache the graph's own inputs.
        ranges: per layer the largest magnitudes of keys and values, each (K, D), as
            `Calibration.cache_ranges` gives them.
        notes: receives what was done.
        per: one scale per channel and head, or one per layer.

    Raises:
        UserError: some layer's attention cannot keep its cache in int8.
    """
    copy = model.clone()
    graph = copy.graph
    nodes = {
        node.inputs[_PAST_KEY]: node
        for node in graph
        if node.op_type == "GroupQueryAttention" and len(node.inputs) > _PAST_VALUE
    }
    for layer, found in enumerate(ranges):
        past = next((v for v in graph.inputs if v.name == f"past_key_values.{layer}.key"), None)
        node = nodes.get(past)
        if past is None or node is None:
            raise UserError(
                f"--cache int8: layer {layer} has no GroupQueryAttention, which alone reads such a "
                f"cache; use --cache fp32, or a target and a model that have it"
            )
        _quantize_layer(graph, node, layer, found, per)
    notes.add(STAGE, "cache", f"int8, a scale per {per}", "asked for; scales from the calibration")
    return copy


def _quantize_layer(
    graph: ir.Graph, node: ir.Node, layer: int, ranges: tuple[Tensor, Tensor], per: str
) -> None:
    node.resize_inputs(_VALUE_SCALE + 1)
    for part, place, largest in zip(
        ("key", "value"), (_KEY_SCALE, _VALUE_SCALE), ranges, strict=True
    ):
        held = ir.Tensor(cache_scale(largest, per=per).numpy())
        scale = ir.Value(
            name=f"cache.{layer}.{part}.scale",
            shape=ir.Shape(held.shape),
            type=ir.TensorType(held.dtype),
            const_value=held,
        )
        graph.register_initializer(scale)
        node.replace_input_with(place, scale)
    for letter in "kv":
        node.attributes.add(ir.AttrString(f"{letter}_quant_type", f"PER_{per.upper()}"))
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
    for value in (*node.inputs[_PAST_KEY : _PAST_VALUE + 1], *node.outputs[1:3]):
        assert value is not None
        value.type = ir.TensorType(ir.DataType.INT8)
