"""ffn on the GPU: bias, addend, activation and gate in the epilogue of one matrix product.

The forward is one kernel, with two accumulators where there is a gate. Training keeps the gate and
what goes into the activation, in the dtype of `x`; a backward that gets neither runs the same
kernel again.

The backward has two forms; both repeat bit for bit, for their sums have a fixed order. The separate
one is an elementwise kernel for the derivative, which also sums the columns for the biases, and the
products of cuBLAS: the derivative is found once, however wide x is. The fused one finds it while it
multiplies for dx, which saves reading it again and a launch, but every tile of a row finds it anew:
it is for activations that cost next to nothing and for few tiles in a row. "bwd_form" in the table
of configurations says up to how many channels FUSED_C of x it runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gptopt.kernels import library
from gptopt.kernels.dtypes import no_autocast
from gptopt.kernels.ffn.reference import ACTIVATIONS, GATED
from gptopt.kernels.ffn.triton_dx import (
    as_rows,
    dot_precision,
    dx_case,
    is_aligned,
    is_fused,
    multiply,
    tile_rows,
    word,
)
from gptopt.kernels.ffn.triton_kernels import ffn_bwd_act_kernel, ffn_fwd_kernel
from gptopt.kernels.launch import (
    INTERPRETED,
    AotCase,
    arch,
    choose,
    launch,
    pointer,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL_M = 64  # rows, up to which a narrow tile is used
PROGRAMS = 2048  # of the elementwise backward, which shares its rows between them


def supports(x: Tensor, *_: Any) -> str | None:
    """Why the kernels cannot run on these arguments of the operator; None if they can."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} has no kernel, only float32, bfloat16 and float16"
    return None


def _supports_backward(grad: Tensor, x: Tensor, *_: Any) -> str | None:
    return supports(x)


def ffn(x: Tensor, *arguments: Any) -> Tensor:
    """The body of gptopt::ffn: nothing is kept."""
    out = _output(x, arguments[0])
    _project(x, *arguments[:6], out=out, hidden=None, gate=None)
    return out


def ffn_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The body of gptopt::ffn_forward."""
    weight, _, gate_weight, *_ = arguments
    out, hidden = _output(x, weight), _output(x, weight)
    gate = x.new_empty(0) if gate_weight is None else _output(x, weight)
    _project(x, *arguments, out=out, hidden=hidden, gate=gate)
    return out, hidden, gate


def _output(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    addend: Tensor | None,
    activation: str,
    *,
    out: Tensor | None,
    hidden: Tensor | None,
    gate: Tensor | None,
) -> None:
    """The forward kernel; writes those of `out`, `hidden` and `gate` that are given."""
    F, C = weight.shape
    M = x.shape[:-1].numel()
    if M == 0 or F == 0:
        return
    x, weight = as_rows(x, M), as_rows(weight, F)
    gated = gate_weight is not None
    gate_weight = None if gate_weight is None else as_rows(gate_weight, F)
    addend = None if addend is None else as_rows(addend, M)
    shape_class = _shape_class(M, gated, is_aligned(x, weight, gate_weight))
    config = choose("ffn.fwd", arch(x.device), x.dtype, shape_class)
    sizes = config.sizes
    launch(
        ffn_fwd_kernel,
        (triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(F, sizes["BLOCK_F"]),),
        x,
        x,
        weight,
        None if bias is None else bias.contiguous(),
        gate_weight,
        None if gate_bias is None else gate_bias.contiguous(),
        addend,
        out,
        hidden,
        gate if gated else None,
        M,
        F,
        C,
        x.stride(0),
        weight.stride(0),
        0 if gate_weight is None else gate_weight.stride(0),
        0 if addend is None else addend.stride(0),
        ACTIVATION=activation,
        PRECISION=dot_precision(),
        MASK_C=C % sizes["BLOCK_C"] != 0,
        **config.options,
    )


def _shape_class(M: int, gated: bool, aligned: bool) -> str:
    """Narrow loads take registers, so rows that begin anywhere get a smaller tile."""
    size = "" if M > SMALL_M else " small"
    return ("gated" if gated else "plain") + (size if aligned else " odd")


def ffn_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    addend: Tensor | None,
    hidden: Tensor | None,
    gate: Tensor | None,
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The body of gptopt::ffn_backward."""
    inputs = (x, weight, bias, gate_weight, gate_bias, addend)
    wanted = [m and y is not None for m, y in zip(output_mask, inputs, strict=True)]
    if hidden is None and any(wanted):
        hidden = _output(x, weight)
        gate = None if gate_weight is None else _output(x, weight)
        _project(*inputs, activation, out=None, hidden=hidden, gate=gate)
    need_x, need_weight, need_bias, need_gate_weight, need_gate_bias, need_addend = wanted
    M, (F, C) = x.shape[:-1].numel(), weight.shape
    grad = as_rows(grad, M)
    gated = gate_weight is not None
    fused = need_x and x.numel() * F > 0 and is_fused(grad, weight, gate_weight, activation)
    blocks, block_rows = tile_rows(M, x, activation) if fused else _slabs(M, F, x)

    def make(*shape: int, wanted: bool, dtype: torch.dtype = x.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    dx = make(M, C, wanted=fused)
    dhidden = make(M, F, wanted=need_weight or need_addend or (need_x and not fused))
    dgate = make(M, F, wanted=need_gate_weight or (need_x and not fused and gated))
    sums = make(blocks, F, wanted=need_bias, dtype=torch.float32)
    gate_sums = make(blocks, F, wanted=need_gate_bias, dtype=torch.float32)
    found = (dhidden, dgate, sums, gate_sums)
    if blocks and any(wanted):
        assert hidden is not None
        kept = hidden.contiguous(), gate.contiguous() if gated and gate is not None else None
        if dx is None:
            config = choose("ffn.bwd_act", arch(x.device), x.dtype)
            grid = (blocks * triton.cdiv(F, config.sizes["BLOCK_F"]),)
            numbers = (M, F, grad.stride(0), block_rows, activation)
            launch(ffn_bwd_act_kernel, grid, x, grad, *kept, *found, *numbers, **config.options)
        else:
            multiply(grad, kept, (weight, gate_weight), dx, found, activation)
    return _products(x, weight, gate_weight, dx, found, wanted)


def _slabs(M: int, F: int, x: Tensor) -> tuple[int, int]:
    """How many programs share the rows of one block of columns, and how many rows each takes."""
    if M == 0 or F == 0:
        return 0, 0
    sizes = choose("ffn.bwd_act", arch(x.device), x.dtype).sizes
    blocks = triton.cdiv(M, sizes["BLOCK_M"])
    share = triton.cdiv(blocks, max(1, PROGRAMS // triton.cdiv(F, sizes["BLOCK_F"])))
    return triton.cdiv(blocks, share), share * sizes["BLOCK_M"]


def _products(
    x: Tensor,
    weight: Tensor,
    gate_weight: Tensor | None,
    dx: Tensor | None,
    found: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients, from those of what goes into the activation and of the gate; dx if missing."""
    dhidden, dgate, sums, gate_sums = found
    need_x, need_weight, _, need_gate_weight, _, need_addend = wanted
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    # One of its own for each: results of an operator share no memory.
    dweight, dgate_weight, daddend = (x.new_empty(0) for _ in range(3))
    with no_autocast(x):
        if need_x and dx is None and dhidden is not None:
            dx = torch.mm(dhidden, weight)
            if dgate is not None and gate_weight is not None:
                dx.addmm_(dgate, gate_weight)
        if dhidden is not None:
            if need_weight:
                dweight = torch.mm(dhidden.t(), rows)
            if need_addend:
                daddend = dhidden.view(*x.shape[:-1], weight.shape[0])
        if need_gate_weight and dgate is not None:
            dgate_weight = torch.mm(dgate.t(), rows)
    dbias, dgate_bias = (
        x.new_empty(0) if s is None else s.sum(0).to(x.dtype) for s in (sums, gate_sums)
    )
    dx = x.new_empty(0) if dx is None else dx.view(x.shape)
    return dx, dweight, dbias, dgate_weight, dgate_bias, daddend


def aot_cases() -> list[AotCase]:
    """Every specialisation to compile ahead of time."""
    cases = []
    for dtype in DTYPES:
        precisions = ("ieee", "tf32") if dtype == torch.float32 else ("ieee",)
        for activation in ACTIVATIONS:
            for precision in precisions:
                cases += [_fwd_case(dtype, activation, precision, *kind) for kind in _AOT_KINDS]
                cases += [dx_case(dtype, activation, precision, whole) for whole in (True, False)]
            cases.append(_bwd_case(dtype, activation))
    return cases


_AOT_KINDS = (  # rows, aligned, channels that fill their blocks
    (4096, True, True),
    (4096, True, False),
    (4096, False, False),
    (SMALL_M, True, True),
    (SMALL_M, True, False),
)


def _fwd_case(
    dtype: torch.dtype, activation: str, precision: str, M: int, aligned: bool, whole: bool
) -> AotCase:
    gated = activation in GATED
    shape_class = _shape_class(M, gated, aligned)
    one, gate = pointer(dtype), pointer(dtype) if gated else None
    width = "i32:16" if aligned else "i32"
    words = [word(dtype), activation, shape_class, "" if whole else "tail", precision]
    return AotCase(
        "ffn",
        ffn_fwd_kernel,
        {
            **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "addend_ptr"), one),
            **dict.fromkeys(("out_ptr", "hidden_ptr"), one),
            **dict.fromkeys(("gate_weight_ptr", "gate_bias_ptr", "gate_ptr"), gate),
            **dict.fromkeys(("F", "C", "x_stride", "weight_stride", "gate_stride"), width),
            "M": "i32",
            "addend_stride": width,
        },
        {"ACTIVATION": activation, "PRECISION": precision, "MASK_C": not whole},
        lambda arch: choose("ffn.fwd", arch, dtype, shape_class),
        " ".join(filter(None, words)),
        dot=dtype != torch.float32,
    )


def _bwd_case(dtype: torch.dtype, activation: str) -> AotCase:
    gated = activation in GATED
    gate = pointer(dtype) if gated else None
    return AotCase(
        "ffn",
        ffn_bwd_act_kernel,
        {
            **dict.fromkeys(("grad_ptr", "hidden_ptr", "dhidden_ptr"), pointer(dtype)),
            **dict.fromkeys(("gate_ptr", "dgate_ptr"), gate),
            "dbias_ptr": "*fp32",
            "dgate_bias_ptr": "*fp32" if gated else None,
            "M": "i32",
            "F": "i32:16",
            "grad_stride": "i32:16",
            "slab_rows": "i32:16",
        },
        {"ACTIVATION": activation},
        lambda arch: choose("ffn.bwd_act", arch, dtype),
        f"{word(dtype)} {activation}",
    )


for _name, _body, _supported in (
    ("ffn", ffn, supports),
    ("ffn_forward", ffn_forward, supports),
    ("ffn_backward", ffn_backward, _supports_backward),
):
    library.register_triton(_name, _body, _supported, interpreted=INTERPRETED)
