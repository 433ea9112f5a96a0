"""cross_entropy on the GPU: the logits live one chunk of tokens at a time.

Per chunk: logits = X W^T by cuBLAS, one kernel that turns each row into its loss and, in place, its
gradient, then dX = G W and dW += G^T X by cuBLAS again. Where the loss is one number the gradients
are found in the forward, those of the sum; the backward multiplies them by grad / count.

Memory beside the results: dW in float32 (V, C), and one chunk of logits in the dtype of `hidden`,
at most 512 MiB or 2048 tokens, whichever is more. Nothing waits for the device: how many targets
count is a tensor.

A target outside the vocabulary makes its loss and its gradients NaN, and reads nothing; with
TRITON_DEBUG=1 it is a device-side assertion.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptopt.kernels import library
from gptopt.kernels.cross_entropy import op
from gptopt.kernels.dtypes import no_autocast
from gptopt.kernels.launch import (
    INTERPRETED,
    AotCase,
    arch,
    cast,
    choose,
    jit,
    launch,
    pointer,
)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_TOKENS = 2048  # in a chunk: with fewer the matrix products starve
MIN_CHUNKS = 8  # where there are tokens for it
MAX_LOGITS_BYTES = 512 * 2**20
_TILE = 128  # rows of the matrix products' tiles
_ALIGNED = 64  # elements: rows of the logits start at 128 bytes, whatever V is


@jit
def _tanh(x: tl.tensor) -> tl.tensor:
    small = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@jit
def _load_logits(
    row_ptr: tl.tensor,
    columns: tl.tensor,
    V: tl.tensor,
    stride: tl.tensor,
    softcap: tl.tensor,
    beyond: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """Logits after the softcap in float32, `beyond` at V and after it."""
    # The mask is `stride` because 16 divides it: the load stays wide where V is odd.
    s = tl.load(row_ptr + columns, mask=columns < stride, other=0.0).to(tl.float32)
    if SOFTCAP:
        s = softcap * _tanh(s / softcap)
    return tl.where(columns < V, s, beyond)


@jit
def cross_entropy_fwd_kernel(
    logits_ptr: tl.tensor,  # (n, V), rows `stride` apart; turned into their gradient if GRADIENT
    targets_ptr: tl.tensor,  # (n,) int64
    weights_ptr: tl.tensor,  # (n,) float32, what each row's gradient is multiplied by; or None
    loss_ptr: tl.tensor,  # (n,) float32, or None
    V: tl.tensor,
    stride: tl.tensor,
    ignore_index: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    softcap: tl.tensor,
    GRADIENT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """One row: its loss and its gradient in two passes, the second of them from the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    block = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        if loss_ptr is not None:
            tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros([BLOCK_V], dtype=logits_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK_V):
                tl.store(logits_ptr + start + block, zeros, mask=start + block < stride)
    else:
        inside = (target >= 0) & (target < V)
        tl.device_assert(inside, "cross_entropy: a target outside the vocabulary")
        # Read before any column is overwritten: the reductions below are barriers.
        at_target = tl.load(logits_ptr + target, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP:
            at_target = softcap * _tanh(at_target / softcap)
        at_target = tl.where(inside, at_target, float("nan"))

        peak = float("-inf")
        total = 0.0
        mass = 0.0
        for start in range(0, V, BLOCK_V):
            columns = start + block
            s = _load_logits(logits_ptr, columns, V, stride, softcap, float("-inf"), SOFTCAP)
            if SMOOTHING:
                mass += tl.sum(tl.where(columns < V, s, 0.0), axis=0)
            higher = tl.maximum(peak, tl.max(s, axis=0))
            total = total * tl.exp2((peak - higher) * _LOG2E)
            total += tl.sum(tl.exp2((s - higher) * _LOG2E), axis=0)
            peak = higher
        above = tl.log2(total) * _LN2  # lse - peak
        lse = peak + above

        if loss_ptr is not None:
            loss = (peak - at_target) + above
            if SMOOTHING:
                loss = (1.0 - smoothing) * loss + smoothing * (lse - mass / V)
            tl.store(loss_ptr + row, loss + z_loss * lse * lse)
        if GRADIENT:
            weight = tl.where(inside, 1.0, float("nan"))
            if weights_ptr is not None:
                weight *= tl.load(weights_ptr + row)
            column = target.to(tl.int32)
            for start in range(0, V, BLOCK_V):
                columns = start + block
                s = _load_logits(logits_ptr, columns, V, stride, softcap, 0.0, SOFTCAP)
                g = tl.exp2((s - lse) * _LOG2E) * (1.0 + 2.0 * z_loss * lse)
                g -= tl.where(columns == column, 1.0 - smoothing, 0.0)
                if SMOOTHING:
                    g -= smoothing / V
                if SOFTCAP:
                    g *= 1.0 - (s / softcap) * (s / softcap)
                g = cast(g * weight, logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + columns, g, mask=columns < stride)


@jit
def cross_entropy_bwd_kernel(
    found_ptr: tl.tensor,  # (n,), the gradient of the summed loss
    scale_ptr: tl.tensor,  # () float32
    out_ptr: tl.tensor,  # (n,)
    n: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """What the forward found, times one number that only the device knows."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(found_ptr + index, mask=index < n, other=0.0).to(tl.float32)
    out = cast(found * tl.load(scale_ptr), out_ptr.dtype.element_ty)
    tl.store(out_ptr + index, out, mask=index < n)


def supports(hidden: Tensor, *_: Any) -> str | None:
    """Why the kernels cannot run on these arguments of the operator; None if they can."""
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} has no kernel, only float32, bfloat16 and float16"
    return None


def _supports_backward(grad: Tensor, hidden: Tensor, *_: Any) -> str | None:
    return supports(hidden)


def chunk_tokens(N: int, V: int, itemsize: int) -> int:
    """How many of N > 0 tokens have their logits in memory at once."""
    most = max(MIN_TOKENS, MAX_LOGITS_BYTES // (max(1, V) * itemsize) // _TILE * _TILE)
    chunks = max(triton.cdiv(N, most), min(MIN_CHUNKS, N // MIN_TOKENS), 1)
    return int(min(most, triton.cdiv(triton.cdiv(N, chunks), _TILE) * _TILE))


def cross_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
    """The body of gptopt::cross_entropy: no gradient is prepared."""
    losses, _, _ = _walk(hidden, head_weight, targets, options, (False, False))
    return _reduced(losses, targets, options)


def cross_entropy_forward(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The body of gptopt::cross_entropy_forward: the loss, and the gradients of the sum."""
    *options, output_mask = arguments
    losses, dhidden, dhead = _walk(hidden, head_weight, targets, options, output_mask)
    return _reduced(losses, targets, options), dhidden, dhead


def cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    dhidden: Tensor | None,
    dhead_weight: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """The body of gptopt::cross_entropy_backward."""
    *options, output_mask = arguments
    if options[-1] == "none":
        weights = grad.reshape(-1).float().contiguous()
        _, *found = _walk(hidden, head_weight, targets, options, output_mask, weights)
        return tuple(x.to(hidden.dtype) for x in found)
    scale = grad.float()
    if options[-1] == "mean":
        scale = scale / op.count(targets, options[0])
    return tuple(
        _scaled(x, scale, hidden.dtype) if wanted and x is not None else hidden.new_empty(0)
        for x, wanted in zip((dhidden, dhead_weight), output_mask, strict=True)
    )


def _walk(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    options: Sequence[Any],
    output_mask: Sequence[bool],
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the tokens, chunk by chunk: their losses (N,), and the gradients of those times
    `weights` (N,), dhidden as `hidden` and dhead_weight in float32."""
    V, C = head_weight.shape
    y = targets.reshape(-1)
    N = len(y)
    x = hidden.reshape(N, C)
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    dhidden = torch.empty(hidden.shape if output_mask[0] else 0, dtype=x.dtype, device=x.device)
    dhead_weight = torch.zeros(
        head_weight.shape if output_mask[1] else 0, dtype=torch.float32, device=x.device
    )
    if N == 0:
        return losses, dhidden, dhead_weight
    size = min(N, chunk_tokens(N, V, x.element_size()))
    padded = triton.cdiv(V, _ALIGNED) * _ALIGNED
    buffer = torch.empty(size, padded, dtype=x.dtype, device=x.device)
    with no_autocast(x):
        for start in range(0, N, size):
            part = slice(start, start + size)
            rows = x[part]
            logits = buffer[: len(rows), :V]
            torch.mm(rows, head_weight.t(), out=logits)
            weight = None if weights is None else weights[part]
            _rows(logits, y[part], losses[part], weight, options, gradient=any(output_mask))
            if output_mask[0]:
                torch.mm(logits, head_weight, out=dhidden.view(N, C)[part])
            if output_mask[1]:
                _accumulate(dhead_weight, logits.t(), rows)
    return losses, dhidden, dhead_weight


def _rows(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    weights: Tensor | None,
    options: Sequence[Any],
    *,
    gradient: bool,
) -> None:
    """The losses of a chunk's rows; with `gradient` the logits become their gradient."""
    ignore_index, label_smoothing, z_loss, softcap, _ = options
    n, V = logits.shape
    config = choose("cross_entropy.fwd", arch(logits.device), logits.dtype)
    launch(
        cross_entropy_fwd_kernel,
        (n,),
        logits,
        logits,
        targets,
        weights,
        losses,
        V,
        logits.stride(0),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        GRADIENT=gradient,
        SMOOTHING=label_smoothing > 0.0,
        SOFTCAP=softcap is not None,
        **config.options,
    )


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, `total` in float32 whatever the others are."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif total.device.type == "cpu":  # the interpreter
        total.addmm_(left.float(), right.float())
    elif torch.version.hip:  # its library has no product of half precision into float32
        total.add_(torch.mm(left, right))
    else:  # one product of cuBLAS; takes a total of another dtype than theirs since torch 2.10
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _scaled(found: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(found.shape, dtype=dtype, device=found.device)
    if n := out.numel():
        config = choose("cross_entropy.bwd", arch(out.device), found.dtype)
        grid = (triton.cdiv(n, config.sizes["BLOCK"]),)
        found = found.contiguous()
        launch(cross_entropy_bwd_kernel, grid, out, found, scale, out, n, **config.options)
    return out


def _reduced(losses: Tensor, targets: Tensor, options: Sequence[Any]) -> Tensor:
    match options[-1]:
        case "none":
            return losses.view(targets.shape)
        case "sum":
            return losses.sum()
        case _:
            return losses.sum() / op.count(targets, options[0])


def aot_cases() -> list[AotCase]:
    """Every specialisation to compile ahead of time."""
    return [
        *(_fwd_case(dtype, *flags) for dtype in DTYPES for flags in _AOT_FLAGS),
        *(_bwd_case(dtype, out) for dtype, out in _AOT_SCALINGS),
    ]


_AOT_FLAGS = ((False, False, False), (True, False, False), (True, True, True))
_AOT_SCALINGS = (
    *((dtype, dtype) for dtype in DTYPES),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)


def _fwd_case(dtype: torch.dtype, gradient: bool, smoothing: bool, softcap: bool) -> AotCase:
    numbers = dict.fromkeys(("smoothing", "z_loss", "softcap"), "fp32")
    flags = {"GRADIENT": gradient, "SMOOTHING": smoothing, "SOFTCAP": softcap}
    return AotCase(
        "cross_entropy",
        cross_entropy_fwd_kernel,
        {
            "logits_ptr": pointer(dtype),
            "targets_ptr": "*i64",
            "weights_ptr": "*fp32" if smoothing else None,
            "loss_ptr": "*fp32",
            "V": "i32",
            "stride": "i32:16",
            "ignore_index": "i32",
            **numbers,
        },
        flags,
        lambda arch: choose("cross_entropy.fwd", arch, dtype),
        " ".join([str(dtype).removeprefix("torch."), *(k.lower() for k, v in flags.items() if v)]),
    )


def _bwd_case(dtype: torch.dtype, out: torch.dtype) -> AotCase:
    names = [str(d).removeprefix("torch.") for d in (dtype, out)]
    return AotCase(
        "cross_entropy",
        cross_entropy_bwd_kernel,
        {"found_ptr": pointer(dtype), "scale_ptr": "*fp32", "out_ptr": pointer(out), "n": "i32:16"},
        {},
        lambda arch: choose("cross_entropy.bwd", arch, dtype),
        " to ".join(names),
    )


for _name, _body, _supported in (
    ("cross_entropy", cross_entropy, supports),
    ("cross_entropy_forward", cross_entropy_forward, supports),
    ("cross_entropy_backward", cross_entropy_backward, _supports_backward),
):
    library.register_triton(_name, _body, _supported, interpreted=INTERPRETED)
