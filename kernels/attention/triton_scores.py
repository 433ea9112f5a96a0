"""What the attention kernels share: who sees whom, how a score is made, which blocks count.

Scores live in the log2 domain: exp(x) = exp2(x * log2(e)), and log2(e) is part of a factor that is
multiplied anyway. Row i of a call's T queries stands at index S - T + i among the S keys; positions
are indices, or with a key_mask the number of real tokens before (see the public docstring).
"""

from math import log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptopt.kernels.launch import Config, jit, launch

LOG2E = log2(2.718281828459045)
MAX_HEAD_DIM = 256
BOUNDS_CONFIG = Config(num_warps=4, num_stages=1)
_MAX_ROW_STRIDE = 2**22  # a block's 256 rows have to stay within 32-bit offsets


@jit
def tanh(x: tl.tensor) -> Any:
    """To about 1e-7 of the value, from exp2: a series where the quotient would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    return tl.where(tl.abs(x) < 0.2, series, 1.0 - 2.0 / (tl.exp2(x * 2.885390081777927) + 1.0))


@jit
def load_block(
    base: tl.tensor,
    start: tl.tensor,
    stride: tl.tensor,
    end: tl.tensor,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
) -> Any:
    """Rows start .. start + ROWS - 1 of a head, (ROWS, BLOCK_D); zeros from `end` and from D on.

    Without EDGE all rows are known to be there. The start is a 64-bit offset, the rest is small.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    if EDGE:
        inside = (start + rows)[:, None] < end
        if D != BLOCK_D:
            inside = inside & (dims[None, :] < D)
        return tl.load(pointers, mask=inside, other=0.0)
    if D != BLOCK_D:
        return tl.load(pointers, mask=dims[None, :] < D, other=0.0)
    return tl.load(pointers)


@jit
def positions(position: tl.tensor, index: tl.tensor, inside: tl.tensor) -> Any:
    """Where the tokens at `index` stand; position: (S,) of one row of the batch, or None."""
    place = index
    if position is not None:
        place = tl.load(position + index, mask=inside, other=0)
    return place


@jit
def documents(doc_ids: tl.tensor, index: tl.tensor, inside: tl.tensor) -> Any:
    """The documents of the tokens at `index`; without doc_ids, (S,) of one row, all are 0."""
    document = index * 0
    if doc_ids is not None:
        document = tl.load(doc_ids + index, mask=inside, other=-1)
    return document


@jit
def key_sees(key_mask: tl.tensor, index: tl.tensor, end: tl.tensor) -> Any:
    """Which keys are real tokens below `end`; key_mask: (S,) uint8 of one row, or None."""
    inside = index < end
    if key_mask is not None:
        inside = tl.load(key_mask + index, mask=inside, other=0) != 0
    return inside


@jit
def visible(
    real: tl.tensor,
    q_index: tl.tensor,
    k_index: tl.tensor,
    q_position: tl.tensor,
    k_position: tl.tensor,
    q_document: tl.tensor,
    k_document: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
) -> Any:
    """Which queries see which keys; all arguments broadcast against each other."""
    see = real & (q_index >= 0)
    if CAUSAL or window is not None:
        see = see & (k_index <= q_index)  # among real keys this is "not a negative distance"
    if window is not None:
        see = see & (q_position - k_position < window)
    return see & (q_document == k_document)


@jit
def log2_scores(
    products: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    slope: tl.tensor,
    q_position: tl.tensor,
    k_position: tl.tensor,
) -> Any:
    """Scores in the log2 domain.

    scale: scale * log2(e), or with a softcap scale / softcap. cap: softcap * log2(e) or None.
    slope: the head's ALiBi slope * log2(e), or None.
    """
    scores = products * scale
    if cap is not None:
        scores = cap * tanh(scores)
    if slope is not None:
        scores = scores - slope * tl.abs(q_position - k_position).to(tl.float32)
    return scores


@jit
def key_range(
    bounds: tl.tensor,
    block: tl.tensor,
    blocks: tl.tensor,
    b: tl.tensor,
    first: tl.tensor,
    S: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Keys that a block of queries visits: masked, then [2] .. [3] without a mask, then masked.

    Returns (start, stop, full_start, full_stop), the last two between the first two.
    first: index of the block's first query. bounds: of `attention_bounds_kernel`, or None.
    """
    if bounds is not None:
        place = bounds + (tl.cast(b, tl.int64) * blocks + block) * 4
        return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    start = first * 0
    full_start = first * 0
    stop = start + S
    full_stop = stop
    if CAUSAL or window is not None:
        stop = tl.minimum(first + BLOCK_M, S)
        full_stop = tl.minimum(first + 1, S)
    full_stop = full_stop // BLOCK_N * BLOCK_N
    if window is not None:
        start = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full_start = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        full_start = tl.minimum(full_start, tl.cdiv(stop, BLOCK_N) * BLOCK_N)
        full_stop = tl.maximum(full_start, full_stop)
    return start, stop, full_start, full_stop


@jit
def query_range(
    bounds: tl.tensor,
    block: tl.tensor,
    blocks: tl.tensor,
    b: tl.tensor,
    first: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """`key_range` seen from a block of keys: the rows 0 .. T - 1 of queries that visit it."""
    if bounds is not None:
        place = bounds + (tl.cast(b, tl.int64) * blocks + block) * 4
        return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    past = S - T
    start = first * 0
    full_start = first * 0
    stop = start + T
    full_stop = stop
    if CAUSAL or window is not None:
        start = tl.maximum(first - past, 0) // BLOCK_M * BLOCK_M
        full_start = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - past, 0), BLOCK_M) * BLOCK_M
    if window is not None:
        stop = tl.maximum(tl.minimum(first + BLOCK_N - 1 - past + window, T), 0)
        full_stop = tl.maximum(tl.minimum(first - past + window, T), 0)
    full_stop = full_stop // BLOCK_M * BLOCK_M
    full_start = tl.minimum(full_start, tl.cdiv(stop, BLOCK_M) * BLOCK_M)
    full_start = tl.maximum(full_start, start)
    full_stop = tl.maximum(full_start, full_stop)
    return start, stop, full_start, full_stop


@jit
def _span(pointer: tl.tensor, index: tl.tensor, inside: tl.tensor) -> Any:
    """Smallest and largest of the values at `index` (blocks, tokens), for each block."""
    if pointer is None:
        values = index
    else:
        values = tl.load(pointer + index, mask=inside, other=0).to(tl.int64)
    low = tl.min(tl.where(inside, values, 2**62), 1)
    high = tl.max(tl.where(inside, values, -(2**62)), 1)
    return low, high


@jit
def attention_bounds_kernel(
    bounds: tl.tensor,  # (B, blocks, 4) int32
    key_mask: tl.tensor,  # (B, S) uint8 or None
    doc_ids: tl.tensor,  # (B, S) integer or None
    position: tl.tensor,  # (B, S) int32 or None
    T: tl.tensor,
    S: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    BY_KEY: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """For each block of OWN queries (BY_KEY: keys) the blocks of OTHER keys (queries) it needs.

    Stores (start, stop, full_start, full_stop) in tokens: outside start .. stop nobody sees
    anything, and in full_start .. full_stop, the last such run, everybody sees everything. Decided
    from the smallest and largest document and position of a block, so never wrong, and exact for
    documents that lie one after the other.
    """
    own_shift = 0 if BY_KEY else S - T
    other_shift = S - T if BY_KEY else 0
    blocks = tl.cdiv(S - own_shift, OWN)
    b = tl.cast(tl.program_id(0) // blocks, tl.int64)
    block = tl.program_id(0) % blocks
    if key_mask is not None:
        key_mask += b * S
    if doc_ids is not None:
        doc_ids += b * S
    if position is not None:
        position += b * S

    own = tl.cast(own_shift + block * OWN + tl.arange(0, OWN)[None, :], tl.int64)
    own_low, own_high = _span(None, own, own < S)
    own_place_low, own_place_high = _span(position, own, own < S)
    own_doc_low, own_doc_high = _span(doc_ids, own, own < S)
    own_whole = tl.max(own, 1) < S

    start = block * 0 + S
    stop = block * 0
    full_start = block * 0
    full_stop = block * 0
    for chunk in range(0, tl.cdiv(S - other_shift, OTHER), CHUNK):
        number = chunk + tl.arange(0, CHUNK)
        tokens = number[:, None] * OTHER + tl.arange(0, OTHER)[None, :]
        other = tl.cast(other_shift + tokens, tl.int64)
        low, high = _span(None, other, other < S)
        place_low, place_high = _span(position, other, other < S)
        doc_low, doc_high = _span(doc_ids, other, other < S)
        some = low < S
        full = (tl.max(other, 1) < S) & own_whole
        if CAUSAL or window is not None:
            if BY_KEY:
                some = some & (high >= own_low)
                full = full & (low >= own_high)
            else:
                some = some & (own_high >= low)
                full = full & (own_low >= high)
        if window is not None:
            if BY_KEY:
                some = some & (place_low - own_place_high < window)
                full = full & (place_high - own_place_low < window)
            else:
                some = some & (own_place_low - place_high < window)
                full = full & (own_place_high - place_low < window)
        if doc_ids is not None:
            some = some & (doc_low <= own_doc_high) & (own_doc_low <= doc_high)
            full = full & (doc_low == doc_high) & (own_doc_low == own_doc_high)
            full = full & (doc_low == own_doc_low)
        if key_mask is not None:
            keys = own if BY_KEY else other
            real = tl.load(key_mask + keys, mask=keys < S, other=0).to(tl.int32)
            some = some & (tl.max(real, 1) != 0)
            full = full & (tl.min(real, 1) != 0)

        start = tl.minimum(start, tl.min(tl.where(some, number, S), 0) * OTHER)
        stop = tl.maximum(stop, tl.max(tl.where(some, number + 1, 0), 0) * OTHER)
        last = tl.max(tl.where(full, number + 1, 0), 0)
        gap = tl.max(tl.where(full | (number >= last), 0, number + 1), 0)
        goes_on = (gap <= chunk) & (full_stop == chunk * OTHER) & (full_stop > full_start)
        begin = tl.where(goes_on, full_start, tl.maximum(gap, chunk) * OTHER)
        full_start = tl.where(last > 0, begin, full_start)
        full_stop = tl.where(last > 0, last * OTHER, full_stop)
    stop = tl.minimum(stop, S - other_shift)
    start = tl.minimum(start, stop)
    empty = full_stop <= full_start
    place = bounds + tl.cast(tl.program_id(0), tl.int64) * 4
    tl.store(place, start)
    tl.store(place + 1, stop)
    tl.store(place + 2, tl.where(empty, start, full_start))
    tl.store(place + 3, tl.where(empty, start, full_stop))


# The host side


class Masks:
    """The options that make and hide scores as the kernels read them, S keys in all.

    extra: what keeps registers busy: "rich" where a score is more than a product, "masked" where
    there is a mask beyond causal and window, or nothing.
    """

    def __init__(
        self,
        key_mask: Tensor | None,
        doc_ids: Tensor | None,
        window: int | None,
        alibi_slopes: Tensor | None,
        softcap: float | None,
        scale: float,
        S: int,
    ) -> None:
        self.key_mask = self.position = None
        if key_mask is not None:
            self.key_mask = key_mask.contiguous().view(torch.uint8)
            if window is not None or alibi_slopes is not None:
                self.position = key_mask.cumsum(-1, dtype=torch.int32) - 1
        self.doc_ids = None if doc_ids is None else doc_ids.contiguous()
        self.slopes = None if alibi_slopes is None else alibi_slopes.float() * LOG2E
        self.window = None if window is None else min(window, S)  # no distance reaches S
        self.cap = None if softcap is None else softcap * LOG2E
        self.scale = scale * LOG2E if softcap is None else scale / softcap
        masked = key_mask is not None or doc_ids is not None
        rich = alibi_slopes is not None or softcap is not None
        self.extra = "rich" if rich else "masked" if masked else ""

    def bounds(
        self, x: Tensor, T: int, S: int, causal: bool, own: int, other: int, by_key: bool
    ) -> Tensor | None:
        """What `attention_bounds_kernel` finds, or None where a formula says it."""
        if self.key_mask is None and self.doc_ids is None:
            return None
        blocks = triton.cdiv(S if by_key else T, own)
        bounds = torch.empty(x.shape[0], blocks, 4, dtype=torch.int32, device=x.device)
        arguments = (bounds, self.key_mask, self.doc_ids, self.position, T, S, self.window)
        grid = (x.shape[0] * blocks,)
        chunk = max(1, 2048 // other)
        constants = (causal, by_key, own, other, chunk)
        options = BOUNDS_CONFIG.options
        launch(attention_bounds_kernel, grid, x, *arguments, *constants, **options)
        return bounds


def readable(x: Tensor) -> bool:
    """Whether a kernel can read heads (B, H, T, D) with the strides that they have."""
    return (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) <= _MAX_ROW_STRIDE


def head_rows(x: Tensor) -> Tensor:
    """`x` (B, H, T, D) itself if a kernel can read it, else contiguous."""
    return x if readable(x) else x.contiguous()


def padded_dim(D: int) -> int:
    """The block that holds D channels: a power of two, and at least what tl.dot takes."""
    return max(16, int(triton.next_power_of_2(D)))


def shape_class(D: int, extra: str = "") -> str:
    """The class of a call in the table of configurations: "d64", "d128 padded masked", "d256 rich".

    extra: as `Masks.extra`, or "rich" with dropout.
    """
    dim = padded_dim(D)
    return " ".join(filter(None, (f"d{max(64, dim)}", "" if dim == D else "padded", extra)))
