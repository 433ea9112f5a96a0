"""ffn as MatMul, Add and the activation.

tanh-GELU and erf-GELU stay apart: they differ by up to 5e-4, which no token comparison would show.
"""

from typing import Any

from onnxscript import opset23 as op

Value = Any  # a tensor in the graph under construction


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
    hidden = _linear(x, weight, bias)
    if addend is not None:
        hidden = op.Add(hidden, addend)
    active = _activate(hidden, activation)
    return active if gate_weight is None else op.Mul(active, _linear(x, gate_weight, gate_bias))


def _linear(x: Value, weight: Value, bias: Value | None) -> Value:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _activate(x: Value, activation: str) -> Value:
    match activation:
        case "relu":
            return op.Relu(x)
        case "relu2":
            positive = op.Relu(x)
            return op.Mul(positive, positive)
        case "gelu" | "geglu":
            return op.Gelu(x, approximate="none")
        case "gelu_tanh":
            return op.Gelu(x, approximate="tanh")
        case "swiglu":
            return op.Mul(x, op.Sigmoid(x))
        case _:
            raise ValueError(f"ffn: activation {activation!r} has no ONNX form")
