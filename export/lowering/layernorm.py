"""layernorm as Add and a normalization operator; a rule or the runtime fuses the pair."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from gptopt.export.lowering.ops import (
    Value,
    ints,
    op,
    rms_normalization,
    simplified_layer_normalization,
)


def lowering(operators: str) -> Callable[..., tuple[Value, Value]]:
    """The lowering whose rmsnorm is made of these operators (Target.operators)."""
    bodies: dict[str, Callable[[Value, Value, float], Value]] = {
        "standard": _standard,
        "microsoft": _microsoft,
        "primitives": _primitives,
    }
    rms = bodies[operators]

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
        # The tracer takes the result for an empty tensor where it is x itself; nobody reads it.
        result = op.Identity(x) if residual is None else h
        if weight is None:
            weight = op.Constant(value=ir.tensor(np.ones(x.shape[-1], dtype=np.float32)))
        if kind == "layer":
            return op.LayerNormalization(h, weight, bias, axis=-1, epsilon=eps)[0], result
        y = rms(h, weight, eps)
        return y if bias is None else op.Add(y, bias), result

    return lower


def _standard(h: Value, weight: Value, eps: float) -> Value:
    return rms_normalization(h, weight, axis=-1, epsilon=eps)


def _microsoft(h: Value, weight: Value, eps: float) -> Value:
    return simplified_layer_normalization(h, weight, axis=-1, epsilon=eps)


def _primitives(h: Value, weight: Value, eps: float) -> Value:
    mean = op.ReduceMean(op.Mul(h, h), ints(-1), keepdims=1)
    return op.Mul(op.Div(h, op.Sqrt(op.Add(mean, eps))), weight)
