"""attention as the standard Attention operator, with the cache as past and present.

The operator's own causal flag is not used: onnxruntime and others read it differently once there is
a cache. One additive mask says it all, and it is the same expression in every layer, so that it is
computed once. It has the full query length, because onnxruntime does not broadcast that axis, and
its lowest value is finite: a row that sees no key (padding) then stays finite on every runtime,
where -inf gives NaN on some, and NaN in a padded row's keys would reach the rows that are read.
"""

from typing import Any

import numpy as np
from onnxscript import opset23 as op

Value = Any  # a tensor in the graph under construction

_FLOAT, _INT64 = 1, 7
_LOWEST = float(np.finfo(np.float32).min)


def lower(
    q: Value,
    k: Value,
    v: Value,
    past_k: Value | None,
    past_v: Value | None,
    key_mask: Value | None,
    doc_ids: Value | None,
    alibi_slopes: Value | None,
    seed: Value | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    need_lse: bool = True,
) -> tuple[Value, ...]:
    """gptopt::attention: (out, present_k, present_v, lse)."""
    if dropout_p:
        raise ValueError(f"attention: dropout_p is {dropout_p}, a graph has no dropout")
    bias = _bias(q, k, past_k, key_mask, doc_ids, alibi_slopes, causal, window)
    attributes: dict[str, Any] = {"scale": scale}
    if softcap is not None:
        attributes["softcap"] = softcap  # applied before the mask, as the operator does
    out, present_k, present_v, _ = op.Attention(q, k, v, bias, past_k, past_v, **attributes)
    if past_k is None:
        present_k, present_v = op.Identity(k), op.Identity(v)
    # The op's signature has a lse; where nobody reads it, nothing of it stays.
    lse = _lse(q, present_k, bias, softcap, scale) if need_lse else op.Identity(q)
    return out, present_k, present_v, lse


def _bias(
    q: Value,
    k: Value,
    past_k: Value | None,
    key_mask: Value | None,
    doc_ids: Value | None,
    alibi_slopes: Value | None,
    causal: bool,
    window: int | None,
) -> Value | None:
    """What is added to the scores, (B | 1, H | 1, T, S), or None where all see all."""
    T, S = _size(q, 2), _size(k, 2)
    if past_k is not None:
        S = _size(key_mask, 1) if key_mask is not None else op.Add(S, _size(past_k, 2))
    P = op.Sub(S, T)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    index = op.Unsqueeze(op.Range(zero, op.Squeeze(S), one), [0])  # (1, S)

    def queries(x: Value) -> Value:  # (B | 1, S) -> (B | 1, 1, T, 1)
        return op.Unsqueeze(op.Slice(x, P, S, [1]), [1, 3])

    def keys(x: Value) -> Value:  # (B | 1, S) -> (B | 1, 1, 1, S)
        return op.Unsqueeze(x, [1, 2])

    position = index
    if key_mask is not None:  # distances count real tokens, so padding does not shift them
        position = op.CumSum(op.Cast(key_mask, to=_INT64), one)
    conditions = []
    if causal:
        conditions.append(op.LessOrEqual(keys(index), queries(index)))
    if key_mask is not None:
        conditions.append(keys(key_mask))
    if doc_ids is not None:
        conditions.append(op.Equal(queries(doc_ids), keys(doc_ids)))
    distance = op.Sub(queries(position), keys(position))
    if window is not None:
        conditions.append(op.Less(distance, op.Constant(value_int=window)))
        if not causal:  # a window looks back
            conditions.append(op.GreaterOrEqual(distance, zero))
    if not conditions and alibi_slopes is None:
        return None
    bias: Value = op.Constant(value_float=0.0)
    if alibi_slopes is not None:
        slopes = op.Unsqueeze(alibi_slopes, [0, 2, 3])  # (1, H, 1, 1)
        bias = op.Mul(op.Neg(slopes), op.Cast(op.Abs(distance), to=_FLOAT))
    if not conditions:
        return bias
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = op.And(seen, condition)
    if not causal and doc_ids is None and alibi_slopes is None:
        seen = op.Expand(seen, op.Concat(_ints(1, 1), T, _ints(1), axis=0))
    return op.Where(seen, bias, op.Constant(value_float=_LOWEST))


def _lse(q: Value, k: Value, bias: Value | None, softcap: float | None, scale: float) -> Value:
    """log sum exp of each query's scores, (B, H, T), for models that read it."""
    B, H, D = _size(q, 0), _size(q, 1), _size(q, 3)
    K, rest = _size(k, 1), _ints(-1)
    grouped = op.Reshape(q, op.Concat(B, K, rest, D, axis=0))  # (B, K, H / K * T, D)
    scores = op.MatMul(grouped, op.Transpose(k, perm=[0, 1, 3, 2]))
    T, S = _size(q, 2), _size(k, 2)
    scores = op.Mul(op.Reshape(scores, op.Concat(B, H, T, S, axis=0)), scale)
    if softcap is not None:
        scores = op.Mul(op.Tanh(op.Div(scores, softcap)), softcap)
    if bias is not None:
        scores = op.Add(scores, bias)
    return op.ReduceLogSumExp(scores, [-1], keepdims=0)


def _ints(*numbers: int) -> Value:
    return op.Constant(value_ints=numbers)


def _size(x: Value, axis: int) -> Value:
    """One size of a tensor, as a vector of one number."""
    return op.Shape(x, start=axis, end=axis + 1)
