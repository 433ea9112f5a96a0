"""What is added to attention's scores: the same expression in every layer, so computed once.

It has the full query length, because onnxruntime does not broadcast that axis, and its lowest value
is finite: a row that sees no key (padding) then stays finite on every runtime, where -inf gives NaN
on some, and NaN in a padded row's keys would reach the rows that are read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptopt.export.lowering.ops import FLOAT, INT64, Value, ints, op, size

LOWEST = float(np.finfo(np.float32).min)

_Part = Callable[[Value], Value]


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one gptopt::attention."""

    q: Value  # (B, H, T, D)
    k: Value  # (B, K, T, D)
    v: Value
    past_k: Value | None  # (B, K, P, D)
    past_v: Value | None
    key_mask: Value | None  # (B, S) bool
    doc_ids: Value | None  # (B, S)
    alibi_slopes: Value | None  # (H,)
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    need_lse: bool


def bias(call: Call) -> Value | None:
    """The bias, (B | 1, H | 1, T, S), or None where all see all."""
    zero, window = op.Constant(value_int=0), call.window
    index, queries, keys = _columns(call)
    position = index
    if call.key_mask is not None:  # distances count real tokens, so padding does not shift them
        position = op.CumSum(op.Cast(call.key_mask, to=INT64), op.Constant(value_int=1))
    distance = op.Sub(queries(position), keys(position))
    conditions = []
    if call.causal:
        conditions.append(op.LessOrEqual(keys(index), queries(index)))
    if call.key_mask is not None:
        conditions.append(keys(call.key_mask))
    if call.doc_ids is not None:
        conditions.append(op.Equal(queries(call.doc_ids), keys(call.doc_ids)))
    if window is not None:
        conditions.append(op.Less(distance, op.Constant(value_int=window)))
        if not call.causal:  # a window looks back
            conditions.append(op.GreaterOrEqual(distance, zero))
    added = None if call.alibi_slopes is None else _slope(call.alibi_slopes, distance)
    if not conditions:
        return added
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = op.And(seen, condition)
    if not call.causal and window is None and call.doc_ids is None and added is None:
        seen = op.Expand(seen, op.Concat(ints(1, 1), size(call.q, 2), ints(1), axis=0))
    otherwise = op.Constant(value_float=0.0) if added is None else added
    return op.Where(seen, otherwise, op.Constant(value_float=LOWEST))


def compact_alibi(call: Call) -> Value:
    """ALiBi's bias (B, H, T, S) where the cache holds no padding: key j is real token j of its row.

    The columns of the mask are still those of the text. Keys that do not exist, and later ones, are
    hidden by the operator itself.
    """
    index, queries, keys = _columns(call)
    order = op.CumSum(op.Cast(call.key_mask, to=INT64), op.Constant(value_int=1))  # from 1
    counted = op.Sub(order, op.Constant(value_int=1))
    return _slope(call.alibi_slopes, op.Sub(queries(counted), keys(index)))


def _columns(call: Call) -> tuple[Value, _Part, _Part]:
    """Numbers (1, S) of the columns, and what a vector (B | 1, S) is to queries and to keys."""
    T, S = size(call.q, 2), size(call.k, 2)
    if call.past_k is not None:
        given = call.key_mask is not None
        S = size(call.key_mask, 1) if given else op.Add(S, size(call.past_k, 2))
    P = op.Sub(S, T)

    def queries(x: Value) -> Value:  # (B | 1, S) -> (B | 1, 1, T, 1)
        return op.Unsqueeze(op.Slice(x, P, S, ints(1)), ints(1, 3))

    def keys(x: Value) -> Value:  # (B | 1, S) -> (B | 1, 1, 1, S)
        return op.Unsqueeze(x, ints(1, 2))

    one = op.Constant(value_int=1)
    numbers = op.Range(op.Constant(value_int=0), op.Squeeze(S), one)
    return op.Unsqueeze(numbers, ints(0)), queries, keys


def _slope(slopes: Value, distance: Value) -> Value:
    steep = op.Neg(op.Unsqueeze(slopes, ints(0, 2, 3)))  # (1, H, 1, 1)
    return op.Mul(steep, op.Cast(op.Abs(distance), to=FLOAT))
