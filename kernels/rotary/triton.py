"""The Triton bodies of rotary: q and k in one launch, whatever their strides.

A program takes a few tokens and a few heads: the tokens' angles are read once, then every head of
q and k that is its own turns by them. Backward turns by the opposite angles.

Nothing is written in place. Forward, what made q and k may need them for its own backward, and in
the model they are views of one projection with v, whose version would change for all three.
Backward, autograd may hand the same gradient to others, and an operator cannot see whether it does.
In place would move as many bytes: it saves an allocation, and loses the contiguous heads that
attention reads.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptopt.kernels.launch import (
    INTERPRETED,
    AotCase,
    Config,
    arch,
    cast,
    choose,
    jit,
    launch,
    pointer,
)
from gptopt.kernels.library import register_triton

Pair = tuple[Tensor, Tensor]


@jit
def _turn(
    x_rows: tl.tensor,  # pointers to the first channel of each token's head, (BLOCK_T,)
    y_rows: tl.tensor,  # the same, of the result
    cos: tl.tensor,  # (BLOCK_T, BLOCK_R)
    sin: tl.tensor,
    here: tl.tensor,  # (BLOCK_T,) tokens that exist
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    """One head of a block of tokens."""
    pairs = tl.arange(0, BLOCK_R)
    if INTERLEAVED:
        # Whole pairs are read, so that neighbours in memory are neighbours in a warp.
        channels = 2 * pairs[None, :, None] + tl.arange(0, 2)[None, None, :]
        mask = here[:, None, None] & (channels < 2 * R)
        x = tl.load(x_rows[:, None, None] + channels, mask=mask, other=0.0)
        a, b = tl.split(x.to(cos.dtype))
        y = tl.join(a * cos - b * sin, b * cos + a * sin)
        tl.store(y_rows[:, None, None] + channels, cast(y, x.dtype), mask=mask)
    else:
        mask = here[:, None] & (pairs < R)[None, :]
        first, second = x_rows[:, None] + pairs[None, :], x_rows[:, None] + (R + pairs)[None, :]
        x = tl.load(first, mask=mask, other=0.0)
        a, b = x.to(cos.dtype), tl.load(second, mask=mask, other=0.0).to(cos.dtype)
        y_first = y_rows[:, None] + pairs[None, :]
        tl.store(y_first, cast(a * cos - b * sin, x.dtype), mask=mask)
        tl.store(y_first + R, cast(b * cos + a * sin, x.dtype), mask=mask)
    if BLOCK_REST > 0:
        rest = 2 * R + tl.arange(0, BLOCK_REST)
        mask = here[:, None] & (rest < D)[None, :]
        x = tl.load(x_rows[:, None] + rest[None, :], mask=mask)
        tl.store(y_rows[:, None] + rest[None, :], x, mask=mask)


@jit
def rotary_kernel(
    q_ptr: tl.tensor,  # (B, H, T, D)
    k_ptr: tl.tensor,  # (B, K, T, D)
    cos_ptr: tl.tensor,  # (B | 1, T, R)
    sin_ptr: tl.tensor,  # (B | 1, T, R)
    q_out_ptr: tl.tensor,  # (B, H, T, D), contiguous
    k_out_ptr: tl.tensor,  # (B, K, T, D), contiguous
    n_tokens: tl.tensor,  # B * T
    T: tl.tensor,
    q_stride_b: tl.tensor,
    q_stride_h: tl.tensor,
    q_stride_t: tl.tensor,
    k_stride_b: tl.tensor,
    k_stride_h: tl.tensor,
    k_stride_t: tl.tensor,
    cos_stride_b: tl.tensor,
    cos_stride_t: tl.tensor,
    sin_stride_b: tl.tensor,
    sin_stride_t: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OPPOSITE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    """Tokens of all rows along the grid's first axis, heads of q and then k along its second."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = token < n_tokens
    b, t = token // T, token % T
    pairs = tl.arange(0, BLOCK_R)[None, :]
    mask = here[:, None] & (pairs < R)
    cos_rows = (cos_ptr + b * cos_stride_b + t * cos_stride_t)[:, None]
    cos = tl.load(cos_rows + pairs, mask=mask, other=0.0).to(WIDE)
    sin_rows = (sin_ptr + b * sin_stride_b + t * sin_stride_t)[:, None]
    sin = tl.load(sin_rows + pairs, mask=mask, other=0.0).to(WIDE)
    if OPPOSITE:
        sin = -sin
    for i in range(HEADS):
        head = tl.program_id(1) * HEADS + i
        if head < H:
            _turn(
                q_ptr + b * q_stride_b + head.to(tl.int64) * q_stride_h + t * q_stride_t,
                q_out_ptr + ((b * H + head) * T + t) * D,
                *(cos, sin, here, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST),
            )
        elif head < H + K:
            _turn(
                k_ptr + b * k_stride_b + (head - H).to(tl.int64) * k_stride_h + t * k_stride_t,
                k_out_ptr + ((b * K + head - H) * T + t) * D,
                *(cos, sin, here, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST),
            )


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why the kernels cannot run on the operator's arguments, or None."""
    if q.shape[3] > 1024:
        return f"a head dim of {q.shape[3]} is above the kernels' 1024"
    return None


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Pair:
    """gptopt::rotary."""
    return _rotate(q, k, cos, sin, interleaved, opposite=False)


def backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Pair:
    """gptopt::rotary_backward."""
    return _rotate(grad_q, grad_k, cos, sin, interleaved, opposite=True)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, opposite: bool
) -> Pair:
    B, H, T, D = q.shape
    K, R = k.shape[1], cos.shape[2]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    if R == 0:
        return q_out.copy_(q), k_out.copy_(k)
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    config = _config(arch(q.device), D, R, q.dtype)
    wide = torch.float64 in (q.dtype, cos.dtype)
    launch(
        rotary_kernel,
        (
            triton.cdiv(B * T, config.sizes["BLOCK_T"]),
            triton.cdiv(H + K, config.sizes["HEADS"]),
        ),
        q,
        *(q, k, cos, sin, q_out, k_out, B * T, T, *q.stride()[:3], *k.stride()[:3]),
        *(*_table_strides(cos), *_table_strides(sin)),
        H=H,
        K=K,
        D=D,
        R=R,
        INTERLEAVED=interleaved,
        OPPOSITE=opposite,
        WIDE=tl.float64 if wide else tl.float32,
        **config.options,
    )
    return q_out, k_out


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Strides of cos or sin over rows and tokens; one row serves all."""
    return (0 if table.shape[0] == 1 else table.stride(0)), table.stride(1)


def _config(name: str, D: int, R: int, dtype: torch.dtype) -> Config:
    """The table's entry for the power of two that holds the pairs."""
    width = triton.next_power_of_2(R)
    rest = D - 2 * R
    sizes = {"BLOCK_R": width, "BLOCK_REST": triton.next_power_of_2(rest) if rest else 0}
    config = choose("rotary.turn", name, dtype, str(width))
    return Config({**config.sizes, **sizes}, config.num_warps, config.num_stages)


def aot_cases() -> Iterator[AotCase]:
    """Head dims of small and large models, whole and partly rotated, both pairings."""
    strides = [f"{x}_stride_{axis}" for x in "qk" for axis in "bht"]
    tables = [f"{x}_stride_{axis}" for x in ("cos", "sin") for axis in "bt"]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for D, R in ((16, 8), (40, 20), (64, 32), (80, 16), (96, 48), (128, 64), (256, 128)):
            for interleaved in (False, True):
                x = pointer(dtype)
                yield AotCase(
                    operator="rotary",
                    kernel=rotary_kernel,
                    arguments={
                        "q_ptr": x,
                        "k_ptr": x,
                        "cos_ptr": "*fp32",
                        "sin_ptr": "*fp32",
                        "q_out_ptr": x,
                        "k_out_ptr": x,
                        "n_tokens": "i32",
                        "T": "i32",
                        **dict.fromkeys(strides, "i32" if D % 16 else "i32:16"),
                        **dict.fromkeys(tables, "i32" if R % 16 else "i32:16"),
                    },
                    constexprs={
                        "H": 12,
                        "K": 4,
                        "D": D,
                        "R": R,
                        "WIDE": tl.float32,
                        "INTERLEAVED": interleaved,
                        "OPPOSITE": False,
                    },
                    config=partial(_config, D=D, R=R, dtype=dtype),
                    label=f"{str(dtype)[6:]} d{D} r{R}" + " interleaved" * interleaved,
                )


register_triton("rotary", forward, supports, interpreted=INTERPRETED)
register_triton("rotary_backward", backward, supports, interpreted=INTERPRETED)
