"""ffn as MatMul, Add and the activation.

tanh-GELU and erf-GELU stay apart: they differ by up to 5e-4, which no token comparison would show.
"""

import math
from collections.abc import Callable

from gptopt.export.lowering.ops import Value, gelu, op


def lowering(operators: str) -> Callable[..., Value]:
    """The lowering whose activations are made of these operators (Target.operators)."""
    activations = _PRIMITIVES if operators == "primitives" else _OPERATORS

    def lower(
        x: Value,
        weight: Value,
        bias: Value | None,
        gate_weight: Value | None,
        gate_bias: Value | None,
        addend: Value | None,
        activation: str,
    ) -> Value:
        """gptopt::ffn: act(x W^T + b + addend) [* (x Wg^T + bg)]."""
        if activation not in activations:
            raise ValueError(f"ffn: activation {activation!r} has no ONNX form")
        hidden = _linear(x, weight, bias)
        if addend is not None:
            hidden = op.Add(hidden, addend)
        active = activations[activation](hidden)
        if gate_weight is None:
            return active
        return op.Mul(active, _linear(x, gate_weight, gate_bias))

    return lower


def _linear(x: Value, weight: Value, bias: Value | None) -> Value:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _relu2(x: Value) -> Value:
    positive = op.Relu(x)
    return op.Mul(positive, positive)


def _silu(x: Value) -> Value:
    return op.Mul(x, op.Sigmoid(x))


def _erf_gelu(x: Value) -> Value:
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0))


def _tanh_gelu(x: Value) -> Value:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Source: Hendrycks & Gimpel 2016."""
    cubic = op.Mul(op.Mul(op.Mul(x, x), x), 0.044715)
    inner = op.Mul(op.Add(x, cubic), math.sqrt(2 / math.pi))
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


_OPERATORS: dict[str, Callable[[Value], Value]] = {
    "relu": lambda x: op.Relu(x),
    "relu2": _relu2,
    "gelu": lambda x: gelu(x, approximate="none"),
    "geglu": lambda x: gelu(x, approximate="none"),
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "swiglu": _silu,
}
_PRIMITIVES = _OPERATORS | {"gelu": _erf_gelu, "geglu": _erf_gelu, "gelu_tanh": _tanh_gelu}
