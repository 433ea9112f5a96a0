"""The operators that lowerings write: standard ones of opset 18, newer ones, com.microsoft's.

A graph of a later opset takes nodes of opset 18 as they are; for opset 17 see opset17.py. The
schemas of com.microsoft's operators are not in the onnx package, so the parts in use stand here.
"""

from collections.abc import Sequence
from typing import Any

import onnx
from onnxscript import opset18, opset20, opset23, values

Value = Any  # a tensor in the graph under construction

FLOAT, INT32, INT64 = 1, 6, 7

op = opset18
gelu = opset20.Gelu
attention = opset23.Attention
rms_normalization = opset23.RMSNormalization
rotary_embedding = opset23.RotaryEmbedding

_Schema = onnx.defs.OpSchema
_MICROSOFT = values.Opset("com.microsoft", 1)


def _contrib(
    name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: dict[str, Any],
    domain: values.Opset = _MICROSOFT,
) -> values.Op:  # fmt: skip
    """An operator; an input is "name:type", with a "?" behind it where it is optional."""
    floats, optional = ["tensor(float)", "tensor(float16)"], _Schema.FormalParameterOption.Optional

    def parameter(text: str) -> Any:
        label, _, kind = text.rstrip("?").partition(":")
        option = optional if text.endswith("?") else _Schema.FormalParameterOption.Single
        return _Schema.FormalParameter(label, kind or "T", param_option=option)

    schema = _Schema(
        name, domain.domain, 1,
        inputs=[parameter(each) for each in inputs],
        outputs=[parameter(each) for each in outputs],
        type_constraints=[("T", floats, "")],
        attributes=[_Schema.Attribute(key, kind) for key, kind in attributes.items()],
    )  # fmt: skip
    return values.Op(domain, name, schema)


_INT, _REAL = _Schema.AttrType.INT, _Schema.AttrType.FLOAT

group_query_attention = _contrib(
    "GroupQueryAttention",
    [
        "query", "key?", "value?", "past_key?", "past_value?", "seqlens_k:tensor(int32)",
        "total_sequence_length:tensor(int32)", "cos_cache?", "sin_cache?",
        "position_ids:tensor(int64)?", "attention_bias?",
    ],
    ["output", "present_key", "present_value"],
    {
        "num_heads": _INT, "kv_num_heads": _INT, "scale": _REAL, "softcap": _REAL,
        "local_window_size": _INT,
    },
)  # fmt: skip
microsoft_rotary_embedding = _contrib(
    "RotaryEmbedding",
    ["input", "position_ids:tensor(int64)", "cos_cache", "sin_cache"],
    ["output"],
    {"num_heads": _INT, "rotary_embedding_dim": _INT, "interleaved": _INT},
)
tensor_scatter = values.Op(
    values.Opset("", 24), "TensorScatter", onnx.defs.get_schema("TensorScatter", 24)
)
# onnxruntime keeps this one in the standard domain, where the onnx package does not know it.
simplified_layer_normalization = _contrib(
    "SimplifiedLayerNormalization", ["X", "scale"], ["Y"], {"axis": _INT, "epsilon": _REAL},
    domain=values.Opset("", 1),
)  # fmt: skip


def ints(*numbers: int) -> Value:
    """A constant vector of int64."""
    return op.Constant(value_ints=numbers)


def size(x: Value, axis: int) -> Value:
    """One size of a tensor, as a vector of one number."""
    return op.Shape(x, start=axis, end=axis + 1)
