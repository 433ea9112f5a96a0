"""What a bisection feeds to a graph and to its model, and which parts of the answers count.

Only what belongs to real tokens does: on padding, a graph and a model may differ.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gptopt.export.contract import Contract
from gptopt.export.counterparts import Check
from gptopt.export.steps import Feeds
from gptopt.runtime.variants import EdgeFile

_SEED = 30
_HIDDEN = -1e4  # an added number below this hides a key, in float16 too


def plays(contract: Contract, file: EdgeFile, block_size: int) -> Iterator[Feeds]:
    """A padded prompt, one more token for each row, and several more for one."""
    random = torch.Generator().manual_seed(_SEED)
    side = 0 if file.padding == "right" else 1
    for name, rows, past, new in (
        ("a padded prompt", 2, 0, 9), ("single tokens", 2, 7, 1), ("part of a prompt", 1, 5, 3),
    ):  # fmt: skip
        if past and not contract.causal:
            continue
        new = min(new, block_size - past)
        if new < 1:
            continue
        mask = torch.ones(rows, past + new, dtype=torch.int64)
        if rows > 1 and past + new > 3 and (side or not past):
            mask[1, :2] = 0  # on the left
            mask = mask if side else mask.flip(1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        ids = torch.randint(0, contract.vocab_size, (rows, new), generator=random)
        shape = (rows, contract.kv_heads, past, contract.head_size)
        cache = [
            (torch.randn(shape, generator=random), torch.randn(shape, generator=random))
            for _ in range(contract.n_layer if contract.causal else 0)
        ]
        yield Feeds(name, ids, mask, positions, cache)


def typed(feeds: Feeds, weights: Mapping[str, Tensor]) -> Feeds:
    """The same with the cache in the floats of the weights."""
    dtype = next(iter(weights.values())).dtype
    return feeds._replace(past=[(k.to(dtype), v.to(dtype)) for k, v in feeds.past])


def inputs(feeds: Feeds, types: Mapping[str, str], file: EdgeFile) -> dict[str, npt.NDArray[Any]]:
    """What a session is given."""
    room = feeds.ids.shape[1] if file.cache == "static" else 0
    given = {
        "input_ids": feeds.ids, "attention_mask": feeds.mask, "position_ids": feeds.positions,
    }  # fmt: skip
    for layer, pair in enumerate(feeds.past):
        for part, tensor in zip(("key", "value"), pair, strict=True):
            name = f"past_key_values.{layer}.{part}"
            tensor = functional.pad(tensor, (0, 0, 0, room))
            given[name] = tensor.half() if "float16" in types.get(name, "") else tensor
    return {name: tensor.numpy() for name, tensor in given.items() if name in types}


def lengths(feeds: Feeds, file: EdgeFile) -> dict[str, Tensor]:
    """What GroupQueryAttention is told of the cache."""
    B, S = feeds.mask.shape
    last = feeds.mask.sum(1) if file.padding == "right" else torch.full((B,), S)
    return {"last tokens": last - 1, "total length": torch.tensor([S])}


def real_part(x: Tensor, feeds: Feeds) -> Tensor | None:
    """The part of a result that belongs to real tokens, (n, C); None where it has no such form.

    x: (B, T, C), (B, H, T or S, D), (B T, C) or (1, T, C).
    """
    B, S = feeds.mask.shape
    T = feeds.ids.shape[1]
    if x.dim() == 4:
        x = x.transpose(1, 2).flatten(2)
    if x.dim() == 2 and x.shape[0] == B * T:
        x = x.view(B, T, -1)
    if x.dim() != 3 or x.shape[0] not in (1, B) or x.shape[1] not in (T, S):
        return None
    real = feeds.mask.bool() if x.shape[1] == S else feeds.mask[:, S - T :].bool()
    return x.expand(B, -1, -1)[real]


def mask_error(
    check: Check, feeds: Feeds, file: EdgeFile, value: npt.NDArray[Any] | None, wanted: Tensor
) -> float:
    """How wrong a mask or bias is, inf where it hides or shows a key that it should not."""
    B, S = feeds.mask.shape
    T = feeds.ids.shape[1]
    gqa = check.node.op_type == "GroupQueryAttention"
    compact = gqa and file.padding == "right"
    if value is None:
        mine = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    else:
        mine = torch.from_numpy(value)
        mine = torch.where(mine, 0.0, -torch.inf) if mine.dtype == torch.bool else mine
        mine = mine.double()
    if mine.dim() != 4:
        return 0.0
    mine, wanted = mine + torch.zeros_like(wanted), wanted + torch.zeros_like(mine)
    rows = feeds.mask[:, None, S - T :, None].bool().expand(B, mine.shape[1], T, S)
    if compact:  # the operator hides; columns of a padded row are others
        whole = feeds.mask.bool().all(1)[:, None, None, None]
        rows = rows & whole & ~torch.isneginf(wanted)
    elif gqa:  # it hides later keys itself
        rows = rows & (torch.arange(S - T, S)[:, None] >= torch.arange(S))
    hidden, shown = torch.isneginf(wanted), mine > _HIDDEN
    if bool((rows & (hidden == shown)).any()):
        return float("inf")
    rows = rows & shown
    if not bool(rows.any()):
        return 0.0
    scale = max(float(wanted[rows].abs().max()), 1.0)
    return float((mine - wanted)[rows].abs().max()) / scale
