"""What attention means, in plain PyTorch.

`softmax_attention` is the specification. `fused_attention` puts the same question to torch's own
kernel wherever that kernel can answer it, because training on a CPU depends on its speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptopt.kernels.dtypes import no_autocast, wide
from gptopt.kernels.philox import drop_probabilities


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    key_mask: Tensor | None,
    doc_ids: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(out, present_k, present_v, lse); the presents are `k` and `v` themselves without a past."""
    if past_k is not None and past_v is not None:
        k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
    T, S = q.shape[2], k.shape[2]
    fused = not need_lse and softcap is None and dropout_p == 0.0
    unmasked = key_mask is None and doc_ids is None and window is None and alibi_slopes is None
    if fused and unmasked:
        if not causal or T == 1:
            return fused_attention(q, k, v, None, None, scale), k, v, None
        if T == S:
            return fused_attention(q, k, v, None, None, scale, causal=True), k, v, None

    distance = distances(T, S, key_mask, q.device)
    see = visible(distance, causal, window)
    if doc_ids is not None:
        see = _both(see, doc_ids[:, S - T :, None] == doc_ids[:, None, :])
    empty = None
    if key_mask is not None:
        see = _both(see, key_mask[:, None, :])
        # A row that sees no key gets every key, so that nothing infinite arises, and then zeros.
        empty = ~see.any(dim=-1, keepdim=True)  # (B, T, 1)
        see = see | empty
    bias = None if alibi_slopes is None else alibi(alibi_slopes, distance, q)
    lse = None
    if fused and fits(bias, q):
        out = fused_attention(q, k, v, see, bias, scale)
    else:
        out, lse = softmax_attention(
            q, k, v, see, bias, softcap, scale, dropout_p, seed, need_lse=need_lse
        )
    if empty is not None:
        out = out.masked_fill(empty.unsqueeze(1), 0.0)
        lse = None if lse is None else lse.masked_fill(empty.squeeze(-1).unsqueeze(1), -torch.inf)
    return out, k, v, lse


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    lengths: Tensor,
    alibi_slopes: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Write k and v behind each row's tokens in the cache, then attend to what is there."""
    T, M = q.shape[2], cache_k.shape[2]
    row = torch.arange(q.shape[0], device=q.device)[:, None]
    position = lengths[:, None].long() + torch.arange(T, device=q.device)  # (B, T)
    cache_k.transpose(1, 2)[row, position] = k.transpose(1, 2)
    cache_v.transpose(1, 2)[row, position] = v.transpose(1, 2)
    distance = position[:, :, None] - torch.arange(M, device=q.device)  # (B, T, M)
    see = visible(distance, True, window)
    bias = None if alibi_slopes is None else alibi(alibi_slopes, distance, q)
    if softcap is None and fits(bias, q):
        return fused_attention(q, cache_k, cache_v, see, bias, scale)
    return softmax_attention(q, cache_k, cache_v, see, bias, softcap, scale)[0]


def distances(T: int, S: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """How many tokens lie between each query and each key, (1 | B, T, S), the past positive.

    Only real tokens count, so that padding on either side shifts nothing.
    """
    if key_mask is None:
        position = torch.arange(S, device=device).unsqueeze(0)  # (1, S)
    else:
        position = key_mask.cumsum(dim=-1) - 1  # (B, S)
    return position[:, S - T :, None] - position[:, None, :]


def visible(distance: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """Which keys each query may see by their distance, (1 | B, T, S); None is all."""
    see = distance >= 0 if causal or window is not None else None
    return see if see is None or window is None else see & (distance < window)


def _both(see: Tensor | None, also: Tensor) -> Tensor:
    return also if see is None else see & also


def alibi(slopes: Tensor, distance: Tensor, q: Tensor) -> Tensor:
    """The bias -slope * |distance|, (1 | B, H, T, S), as wide as statistics over `q`."""
    return -slopes.to(wide(q))[:, None, None] * distance.abs().unsqueeze(1)


def fits(bias: Tensor | None, q: Tensor) -> bool:
    """Whether torch's kernel takes `bias`: it wants the dtype of q, too coarse below float32."""
    return bias is None or bias.dtype == q.dtype


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    see: Tensor | None,
    bias: Tensor | None,
    scale: float,
    *,
    causal: bool = False,
) -> Tensor:
    """The out of `softmax_attention` without softcap and dropout, by torch's kernel."""
    mask = bias
    if see is not None:
        see = see.unsqueeze(1)  # (1 | B, 1, T, S)
        mask = see if bias is None else bias.masked_fill(~see, -torch.inf)
    # torch.compile may hold the comparison as a symbol, and torch's kernel wants a bool.
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210 - see above
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    see: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dropout(softmax(softcap(scale q k^T) + bias, where seen)) v, and the log-sum-exp.

    Every step runs in the dtype of statistics, and the result is rounded once.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    rows = H // K * T  # the query heads of one key head are neighbours: fold them into its rows
    with no_autocast(q):
        folded = q.to(wide(q)).reshape(B, K, rows, D)
        scores = (folded @ k.to(wide(q)).transpose(2, 3)).view(B, H, T, S) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        if see is not None:
            scores = scores.masked_fill(~see.unsqueeze(1), -torch.inf)
        lse = torch.logsumexp(scores, dim=-1) if need_lse else None  # (B, H, T)
        probabilities = torch.softmax(scores, dim=-1)
        if dropout_p > 0.0:
            assert seed is not None
            probabilities = drop_probabilities(probabilities, dropout_p, seed)
        out = probabilities.view(B, K, rows, S) @ v.to(wide(q))
    return out.view(B, H, T, D).to(q.dtype), lse
