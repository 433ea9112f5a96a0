"""rotary as RotaryEmbedding, fed with the cosines and sines of the tokens at hand."""

from collections.abc import Callable

from gptopt.export.lowering.ops import (
    Value,
    ints,
    microsoft_rotary_embedding,
    op,
    rotary_embedding,
    size,
)


def lowering(operators: str) -> Callable[..., tuple[Value, ...]]:
    """The lowering to these operators (Target.operators)."""
    return {"standard": _standard, "microsoft": _microsoft, "primitives": _primitives}[operators]


def _standard(q: Value, k: Value, cos: Value, sin: Value, interleaved: bool) -> tuple[Value, ...]:
    """gptopt::rotary: (q, k), as the standard operator."""
    width = 2 * cos.shape[-1]
    if cos.shape[0] == 1:  # the operator wants the tables of every row
        shape = op.Concat(size(q, 0), ints(1, 1), axis=0)
        cos, sin = op.Expand(cos, shape), op.Expand(sin, shape)
    attributes = {"interleaved": int(interleaved)}
    return tuple(rotary_embedding(x, cos, sin, **attributes, **_partial(x, width)) for x in (q, k))


def _microsoft(q: Value, k: Value, cos: Value, sin: Value, interleaved: bool) -> tuple[Value, ...]:
    """gptopt::rotary as com.microsoft.RotaryEmbedding, which reads rows of one table by number."""
    half = cos.shape[-1]
    table = (op.Reshape(cos, ints(-1, half)), op.Reshape(sin, ints(-1, half)))  # (B | 1 T, R)
    B, T = size(q, 0), size(q, 2)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    if cos.shape[0] == 1:
        numbers = op.Expand(op.Range(zero, op.Squeeze(T), one), op.Concat(B, T, axis=0))
    else:
        numbers = op.Range(zero, op.Squeeze(op.Mul(B, T)), one)
        numbers = op.Reshape(numbers, op.Concat(B, T, axis=0))
    attributes = {"interleaved": int(interleaved)}
    return tuple(
        microsoft_rotary_embedding(x, numbers, *table, **attributes, **_heads(x, 2 * half))
        for x in (q, k)
    )


def _primitives(q: Value, k: Value, cos: Value, sin: Value, interleaved: bool) -> tuple[Value, ...]:
    """gptopt::rotary for runtimes without the operator."""
    half = cos.shape[-1]
    tables = (op.Unsqueeze(cos, ints(1)), op.Unsqueeze(sin, ints(1)))  # (B | 1, 1, T, R)
    return tuple(_turn(x, *tables, half, interleaved) for x in (q, k))


def _turn(x: Value, cos: Value, sin: Value, half: int, interleaved: bool) -> Value:
    """Each pair (a, b) of the first 2R channels as (a cos - b sin, b cos + a sin)."""
    step, D = (2 if interleaved else 1), x.shape[-1]
    start = 1 if interleaved else half
    a = op.Slice(x, ints(0), ints(2 * half if interleaved else half), ints(3), ints(step))
    b = op.Slice(x, ints(start), ints(2 * half), ints(3), ints(step))
    pair = [op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin))]
    if interleaved:
        pair = [op.Unsqueeze(part, ints(4)) for part in pair]
        turned = op.Reshape(op.Concat(*pair, axis=4), ints(0, 0, 0, -1))
        pair = [turned]
    if 2 * half < D:
        pair.append(op.Slice(x, ints(2 * half), ints(D), ints(3)))
    return pair[0] if len(pair) == 1 else op.Concat(*pair, axis=3)


def _partial(x: Value, width: int) -> dict[str, int]:
    return {"rotary_embedding_dim": width} if width < x.shape[-1] else {}


def _heads(x: Value, width: int) -> dict[str, int]:
    part = _partial(x, width)
    return {**part, "num_heads": x.shape[1]} if part else {}
