"""The Triton bodies of attention: what they take, how they are registered, what is compiled."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptopt.kernels.attention.triton_backward import attention_bwd_delta_kernel, backward
from gptopt.kernels.attention.triton_decode import (
    attention_decode_join_kernel,
    attention_decode_kernel,
    decode,
)
from gptopt.kernels.attention.triton_forward import attention_fwd_kernel, forward
from gptopt.kernels.attention.triton_gradients import attention_bwd_dkdv_kernel
from gptopt.kernels.attention.triton_query_gradients import attention_bwd_dq_kernel
from gptopt.kernels.attention.triton_scores import (
    BOUNDS_CONFIG,
    MAX_HEAD_DIM,
    attention_bounds_kernel,
    padded_dim,
    readable,
    shape_class,
)
from gptopt.kernels.launch import INTERPRETED, AotCase, choose, pointer
from gptopt.kernels.library import register_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Compiled ahead of time: every block size, and a padded head of each (72 and 96 are compiled as 80
# is, but for one constant of a mask: their rows were the same).
HEAD_DIMS = (16, 32, 40, 64, 80, 128, 192, 256)
MAX_TOKENS = 2**31 - 1024


def supports(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, *_: Any) -> str | None:
    """Why the kernels cannot run on the arguments of gptopt::attention, or None."""
    S = k.shape[2] + (0 if past_k is None else past_k.shape[2])
    return _obstacle(q, S)


def supports_backward(grad_out: Any, grad_lse: Any, q: Tensor, k: Tensor, *_: Any) -> str | None:
    """`supports`, of gptopt::attention_backward."""
    return _obstacle(q, k.shape[2])


def supports_decode(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, *_: Any
) -> str | None:
    """`supports`, of gptopt::attention_decode."""
    if not readable(cache_k) or not readable(cache_v):
        return "a cache whose channels are not neighbours has no kernel"
    return _obstacle(q, cache_k.shape[2])


def _obstacle(q: Tensor, S: int) -> str | None:
    D = q.shape[3]
    if q.dtype not in DTYPES:
        return f"{q.dtype} has no kernel, only float32, bfloat16 and float16"
    if not 1 <= D <= MAX_HEAD_DIM:
        return f"heads of {D} channels have no kernel, only 1 to {MAX_HEAD_DIM}"
    if S > MAX_TOKENS:
        return f"{S} keys are above the kernels' {MAX_TOKENS}"
    return None


_Options = tuple[str, ...]
_MASKED: _Options = ("key_mask", "doc_ids", "position", "bounds", "window")
_RICH: _Options = (*_MASKED, "slopes", "seed", "cap")
_VARIANTS: dict[str, _Options] = {"causal": (), "full": (), "masked": _MASKED, "rich": _RICH}
_MATMUL_KERNELS = {
    "fwd": attention_fwd_kernel,
    "bwd_dkdv": attention_bwd_dkdv_kernel,
    "bwd_fast": attention_bwd_dkdv_kernel,
    "bwd_dq": attention_bwd_dq_kernel,
    "decode": attention_decode_kernel,
}
_DQ = {"bwd_delta": "*fp32", "bwd_fast": "*fp32", "bwd_dkdv": None}  # where it is a sum, or is not
_OPTIONAL = {
    "key_mask": "*u8",
    "doc_ids": "*i64",
    "position": "*i32",
    "bounds": "*i32",
    "slopes": "*fp32",
    "seed": "*i64",
    "cap": "fp32",
    "window": "i32",
}
_FIXED: dict[str, str | int | None] = {
    **dict.fromkeys(("lse", "lse2", "delta", "grad_lse", "parts"), "*fp32"),
    **dict.fromkeys(("scale", "keep_scale", "product_scale"), "fp32"),
    **dict.fromkeys(("B", "H", "N", "M"), "i32"),
    **dict.fromkeys(("T", "S"), "i32:16"),
    "group": 1,
    "threshold": "i64",
    "lengths": "*i64",
}


def aot_cases() -> Iterator[AotCase]:
    """Each kernel, dtype and head size: causal, full, masked, and all options."""
    for dtype in DTYPES:
        for D in HEAD_DIMS:
            for name in _MATMUL_KERNELS:
                for variant, options in _VARIANTS.items():
                    if name != "decode" or variant in ("causal", "rich"):
                        yield _matmul_case(name, dtype, D, variant, options)
            yield _case("bwd_delta", attention_bwd_delta_kernel, dtype, D)
            yield _case("decode_join", attention_decode_join_kernel, dtype, D)
    for by_key in (False, True):
        arguments = {"bounds": "*i32", "key_mask": "*u8", "doc_ids": "*i64", "position": "*i32"}
        yield AotCase(
            operator="attention",
            kernel=attention_bounds_kernel,
            arguments={**arguments, "T": "i32:16", "S": "i32:16", "window": "i32"},
            constexprs={
                "CAUSAL": True,
                "BY_KEY": by_key,
                "OWN": 128,
                "OTHER": 64,
                "CHUNK": 32,
            },
            config=lambda arch: BOUNDS_CONFIG,
            label="by key" if by_key else "by query",
        )


def _matmul_case(name: str, dtype: torch.dtype, D: int, variant: str, options: _Options) -> AotCase:
    half = dtype != torch.float32
    return _case(
        *(name, _MATMUL_KERNELS[name], dtype, D, variant, options),
        dot=half and name != "decode",
        tile="BLOCK_N" if name in ("bwd_dkdv", "bwd_fast") else "BLOCK_M",
        CAUSAL=variant != "full",
        FOLD="cap" not in options,
    )


def _case(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    D: int,
    variant: str = "",
    options: _Options = (),
    dot: bool = False,
    tile: str = "BLOCK_M",
    **flags: bool,
) -> AotCase:
    known = {"D": D, "BLOCK_D": padded_dim(D), "SPLITS": 8, **flags}
    optional = {key: kind if key in options else None for key, kind in _OPTIONAL.items()}
    shape = shape_class(D, "rich" if "cap" in options else "masked" if "bounds" in options else "")
    arguments: dict[str, str | int | None] = {}
    for argument in kernel.arg_names:
        if argument.startswith("stride_"):
            arguments[argument] = "i32:16" if D % 8 == 0 else "i32"
        elif argument in _FIXED or argument in _OPTIONAL:
            arguments[argument] = {**_FIXED, **optional}[argument]
        elif argument not in known and not argument.startswith("BLOCK_"):
            arguments[argument] = pointer(dtype)
    if name in _DQ:
        arguments["dq"] = _DQ[name]
    if name == "decode":
        arguments |= {"T": "i32", "out": "*fp32"}
    return AotCase(
        operator="attention" if not name.startswith("decode") else "attention_decode",
        kernel=kernel,
        arguments=arguments,
        constexprs={key: value for key, value in known.items() if key in kernel.arg_names},
        config=lambda arch: choose(f"attention.{name}", arch, dtype, shape),
        label=f"{str(dtype)[6:]} d{D} {variant}{' fast' * (name == 'bwd_fast')}".strip(),
        dot=dot,
        tile=tile,
    )


register_triton("attention", forward, supports, interpreted=INTERPRETED)
register_triton("attention_backward", backward, supports_backward, interpreted=INTERPRETED)
register_triton("attention_decode", decode, supports_decode, interpreted=INTERPRETED)
