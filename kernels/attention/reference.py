"""What attention means, in plain PyTorch.

`softmax_attention` is the specification. `fused_attention` puts the same question to torch's own
kernel wherever that kernel can answer it, because training on a CPU depends on its speed.
"""

import torch
import torch.nn.functional as F
from gptopt.kernels.philox import drop_probabilities
from torch import Tensor


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
    if fused and unmasked and (not causal or T == S or T == 1):
        return fused_attention(q, k, v, None, None, scale, causal=causal and T > 1), k, v, None

    distance = distances(T, S, key_mask, q.device)
    see = visible(distance, causal, window)
    if doc_ids is not None:
        see = _both(see, doc_ids[:, S - T :, None] == doc_ids[:, None, :])
    empty = None
    if key_mask is not None:
        see = _both(see, key_mask[:, None, :])
        # A row that sees no key gets every key, so that nothing infinite arises, and then zeros.
        empty = ~see.any(dim=-1, keepdim=True)
        see = see | empty
    out, lse = _attend(
        q, k, v, see, distance, alibi_slopes, seed, softcap, scale, dropout_p, fused=fused
    )
    if empty is not None:
        out = out.masked_fill(empty.unsqueeze(1), 0.0)
        lse = None if lse is None else lse.masked_fill(empty.squeeze(-1).unsqueeze(1), -torch.inf)
    return out, k, v, lse


@torch.no_grad()
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
    fused = softcap is None
    return _attend(
        q, cache_k, cache_v, see, distance, alibi_slopes, None, softcap, scale, 0.0, fused=fused
    )[0]


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


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    see: Tensor | None,
    distance: Tensor,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    *,
    fused: bool,
) -> tuple[Tensor, Tensor | None]:
    see = None if see is None else see.unsqueeze(1)  # (1 | B, 1, T, S)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = None
    if alibi_slopes is not None:
        bias = -alibi_slopes.to(wide)[:, None, None] * distance.abs().unsqueeze(1)  # (., H, T, S)
    # torch's kernel wants the bias in the dtype of q, and bfloat16 cannot hold long distances.
    if fused and (bias is None or bias.dtype == q.dtype):
        return fused_attention(q, k, v, see, bias, scale), None
    return softmax_attention(q, k, v, see, bias, seed, softcap, scale, dropout_p, wide)


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
    """`softmax_attention` without softcap, dropout and lse, by torch's kernel."""
    mask = see
    if bias is not None:
        mask = bias if see is None else bias.masked_fill(~see, -torch.inf)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    see: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """softmax(softcap(scale q k^T) + bias, where visible) v and the log-sum-exp, all in `wide`."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(wide).reshape(B, K, H // K * T, D)  # the heads of a group are neighbours
        scores = (grouped @ k.to(wide).transpose(2, 3)).view(B, H, T, S) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        if see is not None:
            scores = scores.masked_fill(~see, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)  # (B, H, T)
        probabilities = torch.exp(scores - lse.unsqueeze(-1))
        if dropout_p > 0.0:
            assert seed is not None
            probabilities = drop_probabilities(probabilities, dropout_p, seed)
        out = probabilities.view(B, K, H // K * T, S) @ v.to(wide)
    return out.view(B, H, T, D).to(q.dtype), lse
