"""layernorm as Add and LayerNormalization or RMSNormalization; runtimes fuse the pair."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset23 as op

Value = Any  # a tensor in the graph under construction


def lower(
    x: Value,
    weight: Value | None,
    bias: Value | None,
    residual: Value | None,
    seed: Value | None,
    kind: str,
    eps: float,
    dropout_p: float,
) -> tuple[Value, Value]:
    """gptopt::layernorm: (y, h)."""
    if dropout_p:
        raise ValueError(f"layernorm: dropout_p is {dropout_p}, a graph has no dropout")
    h = x if residual is None else op.Add(x, residual)
    # The tracer takes the result for an empty tensor where it is x itself; nobody reads it then.
    result = op.Identity(x) if residual is None else h
    if weight is None:
        weight = op.Constant(value=ir.tensor(np.ones(x.shape[-1], dtype=np.float32)))
    if kind == "layer":
        return op.LayerNormalization(h, weight, bias, axis=-1, epsilon=eps)[0], result
    y = op.RMSNormalization(h, weight, axis=-1, epsilon=eps)
    return y if bias is None else op.Add(y, bias), result
