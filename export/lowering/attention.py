"""attention as the target's operator, or in primitives, with the cache as past and present.

The standard operator's own causal flag is not used: onnxruntime and others read it differently once
there is a cache. One additive mask says it all (mask.py).
"""

from collections.abc import Callable
from typing import Any

from gptopt.export.lowering import gqa, scatter
from gptopt.export.lowering.mask import Call, bias
from gptopt.export.lowering.ops import Value, ints, op, size
from gptopt.export.lowering.ops import attention as standard_attention
from gptopt.export.targets import Target


def lowering(target: Target) -> Callable[..., tuple[Value, ...]]:
    """What gptopt::attention becomes for a target."""
    form = {
        "standard": _standard, "scatter": _static, "primitives": _primitives, "gqa": gqa.with_bias
    }[target.attention]  # fmt: skip
    if target.attention == "gqa" and target.padding == "right":
        form = gqa.compact

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
        return form(
            Call(
                q, k, v, past_k, past_v, key_mask, doc_ids, alibi_slopes, causal, window, softcap,
                scale, need_lse,
            )
        )  # fmt: skip

    return lower


def _standard(call: Call) -> tuple[Value, ...]:
    added = bias(call)
    out, present_k, present_v, _ = standard_attention(
        call.q, call.k, call.v, added, call.past_k, call.past_v, **_attributes(call)
    )
    if call.past_k is None:
        present_k, present_v = op.Identity(call.k), op.Identity(call.v)
    # The op's signature has a lse; where nobody reads it, nothing of it stays.
    lse = _lse(_scores(call, present_k, added)) if call.need_lse else op.Identity(call.q)
    return out, present_k, present_v, lse


def _static(call: Call) -> tuple[Value, ...]:
    added = bias(call)
    keys, values, present_k, present_v = scatter.write(call)
    out, *_ = standard_attention(call.q, keys, values, added, **_attributes(call))
    lse = _lse(_scores(call, keys, added)) if call.need_lse else op.Identity(call.q)
    return out, present_k, present_v, lse


def _attributes(call: Call) -> dict[str, Any]:
    """Of the standard operator, which caps scores before it masks them, as ours does."""
    return {"scale": call.scale} | ({} if call.softcap is None else {"softcap": call.softcap})


def _primitives(call: Call) -> tuple[Value, ...]:
    """For runtimes without an Attention operator."""
    keys, values = call.k, call.v
    if call.past_k is not None:
        keys = op.Concat(call.past_k, keys, axis=2)
        values = op.Concat(call.past_v, values, axis=2)
    scores = _scores(call, keys, bias(call))  # (B, H, T, S)
    weights = op.Softmax(scores, axis=-1)
    H, K, D = call.q.shape[1], call.k.shape[1], call.v.shape[3]
    if H == K:
        out = op.MatMul(weights, values)
    else:
        T, S = size(call.q, 2), size(values, 2)
        weights = op.Reshape(weights, op.Concat(ints(0, K, -1), S, axis=0))  # (B, K, H / K T, S)
        shape = op.Concat(ints(0, H), T, ints(D), axis=0)
        out = op.Reshape(op.MatMul(weights, values), shape)
    lse = _lse(scores) if call.need_lse else op.Identity(call.q)
    # Without a past the tracer takes the presents for empty; nobody reads them then.
    return out, op.Identity(keys), op.Identity(values), lse


def _scores(call: Call, keys: Value, added: Value | None) -> Value:
    """Scores (B, H, T, S) of all keys (B, K, S, D), capped and masked."""
    H, K, D = call.q.shape[1], call.k.shape[1], call.q.shape[3]
    transposed = op.Transpose(keys, perm=[0, 1, 3, 2])
    if H == K:
        scores = op.MatMul(call.q, transposed)
    else:
        grouped = op.Reshape(call.q, ints(0, K, -1, D))  # (B, K, H / K T, D)
        shape = op.Concat(ints(0, H), size(call.q, 2), size(keys, 2), axis=0)
        scores = op.Reshape(op.MatMul(grouped, transposed), shape)
    scores = op.Mul(scores, call.scale)
    if call.softcap is not None:
        scores = op.Mul(op.Tanh(op.Div(scores, call.softcap)), call.softcap)
    return scores if added is None else op.Add(scores, added)


def _lse(scores: Value) -> Value:
    """log sum exp of each query's scores, (B, H, T), for models that read it."""
    return op.ReduceLogSumExp(scores, ints(-1), keepdims=0)
