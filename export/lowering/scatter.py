"""attention with a static cache: TensorScatter writes the new keys, the standard Attention reads.

A runtime binds one buffer of any capacity as past and present. What Attention reads is cut from it
at the length of the mask: told by nonpad_kv_seqlen instead, onnxruntime 1.31 on the CPU computes
with the whole buffer (64 tokens in one of 1024: 2.7 ms against 1.1 ms for 4 layers of GPT-2), and
an explicit mask would have to be as long as the buffer too.
"""

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from gptopt.export.lowering.mask import Call
from gptopt.export.lowering.ops import Value, ints, op, size, tensor_scatter

_PAST = ("past_k", "past_v")


def obstacle(program: ExportedProgram) -> str | None:
    """Why the cache of a model cannot be a buffer longer than the text; None where it can."""
    attention = torch.ops.gptopt.attention.default
    names = [argument.name for argument in attention._schema.arguments]
    cached: set[Node] = set()
    for node in program.graph.nodes:
        if node.target is not attention:
            continue
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        past = [each for name in _PAST if isinstance(each := given.get(name), Node)]
        if len(past) < len(_PAST):
            return "an attention has no cache"
        if given.get("key_mask") is None:
            return "an attention does not read the mask, which tells how long the text is"
        if any(each.op != "placeholder" for each in past):
            return "an attention reads a cache that the model has changed"
        cached.update(past)
    if any(user.target is not attention for each in cached for user in each.users):
        return "the model reads its cache, or the length of it, outside of attention"
    return None


def write(call: Call) -> tuple[Value, Value, Value, Value]:
    """Keys and values as they are read (B, K, S, D), and the buffers (B, K, M, D) behind them."""
    S = size(call.key_mask, 1)
    begin = op.Expand(op.Sub(S, size(call.q, 2)), size(call.key_mask, 0))  # (B,)
    present_k = tensor_scatter(call.past_k, call.k, begin, axis=2)
    present_v = tensor_scatter(call.past_v, call.v, begin, axis=2)
    keys, values = (op.Slice(each, ints(0), S, ints(2)) for each in (present_k, present_v))
    return keys, values, present_k, present_v
