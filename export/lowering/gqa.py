"""attention as com.microsoft.GroupQueryAttention, whose cache may be one buffer, past and present.

Two readings of padding (Target.padding). "any": each row has as many cached tokens as the mask has
columns, and a bias hides the padded ones, so the operator's answer is that of the standard form for
padding on either side. "right": the operator is told how many real tokens each row has; a row's
next token overwrites its padding, and no bias is needed, unless ALiBi adds one.
"""

import dataclasses
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from gptopt.export.lowering.mask import Call, bias, compact_alibi
from gptopt.export.lowering.ops import INT32, INT64, Value, group_query_attention, ints, op, size


def obstacle(program: ExportedProgram, *, softcap: bool = True) -> str | None:
    """Why GroupQueryAttention cannot run a model as a whole; None where it can.

    All layers take one form: they share the mask, and a cache that is padded in one way.

    Args:
        program: the recorded model.
        softcap: whether the kernels cap scores. WebGPU's do not, and say nothing.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.gptopt.attention.default:
            reason = _refusal(node, softcap)
            if reason is not None:
                return reason
    return None


def _refusal(node: Node, softcap: bool) -> str | None:
    names = [argument.name for argument in torch.ops.gptopt.attention.default._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    D = given["q"].meta["val"].shape[3]
    if not given.get("causal", True):
        return "GroupQueryAttention on the CPU is causal"
    if given.get("softcap") is not None and not softcap:
        return "GroupQueryAttention on WebGPU does not cap its scores"
    if given.get("past_k") is None:
        return "an attention has no cache"
    if given.get("key_mask") is None:
        return "an attention does not read the mask"
    if D % 8:
        return f"GroupQueryAttention on the CPU wants heads of a multiple of 8 channels, not {D}"
    if given["v"].meta["val"].shape[3] != D:
        return "keys and values have heads of different sizes"
    if given.get("doc_ids") is not None:
        return "GroupQueryAttention does not keep documents apart"
    if any(user.args[1] == 3 and user.users for user in node.users):
        return "the model reads the log-sum-exp of an attention"
    return None


def with_bias(call: Call) -> tuple[Value, ...]:
    """The cache holds padding, on either side, and a bias hides it."""
    # The operator itself hides later keys. A window counts real tokens, so the bias does it.
    added = bias(dataclasses.replace(call, causal=False))
    last = op.Cast(op.Sub(size(call.key_mask, 1), ints(1)), to=INT32)
    return _node(call, op.Expand(last, size(call.key_mask, 0)), added, None)


def compact(call: Call) -> tuple[Value, ...]:
    """The cache of each row holds its real tokens and no padding."""
    added = None if call.alibi_slopes is None else compact_alibi(call)
    real = op.ReduceSum(op.Cast(call.key_mask, to=INT64), ints(1), keepdims=0)
    return _node(call, op.Cast(op.Sub(real, ints(1)), to=INT32), added, call.window)


def _node(call: Call, last: Value, added: Value | None, window: int | None) -> tuple[Value, ...]:
    """The node, fed with (B, H, T, D) for now: passes.keep_heads_last gives it what it wants.

    `last` (B,) int32 is the number of each row's last cached token.
    """
    total = op.Cast(op.Squeeze(size(call.key_mask, 1)), to=INT32)  # ()
    attributes: dict[str, Any] = {
        "num_heads": call.q.shape[1], "kv_num_heads": call.k.shape[1], "scale": call.scale,
    }  # fmt: skip
    if call.softcap is not None:
        attributes["softcap"] = call.softcap
    if window is not None:
        attributes["local_window_size"] = window
    out, present_k, present_v = group_query_attention(
        call.q, call.k, call.v, call.past_k, call.past_v, last, total, None, None, None, added,
        **attributes,
    )  # fmt: skip
    return out, present_k, present_v, op.Identity(call.q)
