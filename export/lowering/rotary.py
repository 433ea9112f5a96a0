"""rotary as the standard RotaryEmbedding, fed with the cosines and sines of the tokens at hand."""

from typing import Any

from onnxscript import opset23 as op

Value = Any  # a tensor in the graph under construction


def lower(q: Value, k: Value, cos: Value, sin: Value, interleaved: bool) -> tuple[Value, ...]:
    """gptopt::rotary: (q, k)."""
    width = 2 * cos.shape[-1]
    if cos.shape[0] == 1:  # the operator wants the tables of every row
        batch = op.Shape(q, start=0, end=1)
        shape = op.Concat(batch, op.Constant(value_ints=[1, 1]), axis=0)
        cos, sin = op.Expand(cos, shape), op.Expand(sin, shape)
    return tuple(_rotate(x, cos, sin, width, interleaved) for x in (q, k))


def _rotate(x: Value, cos: Value, sin: Value, width: int, interleaved: bool) -> Value:
    attributes = {"interleaved": int(interleaved)}
    if width < x.shape[-1]:
        attributes["rotary_embedding_dim"] = width
    return op.RotaryEmbedding(x, cos, sin, **attributes)
