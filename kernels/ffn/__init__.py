"""ffn: the first half of a feed-forward layer, linear and activation in one operator."""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptopt.kernels import library
from gptopt.kernels.checks import check_float, check_like, check_shape, shape, wrong
from gptopt.kernels.dtypes import autocast
from gptopt.kernels.ffn import op as _op  # noqa: F401 - registers gptopt::ffn
from gptopt.kernels.ffn import reference
from gptopt.kernels.select import Impl, runs_triton

__all__ = ["Activation", "ffn"]

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "swiglu", "geglu"]


def ffn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: Activation,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    addend: Tensor | None = None,
    recompute: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Return act(x W^T + b + addend), times (x Wg^T + bg) for a gated activation.

    It ends after the activation: the projection back to C channels is an ordinary linear layer.

    Args:
        x: (..., C) float32, bfloat16, float16 or float64, any strides.
        weight: (F, C).
        bias: (F,) or None.
        activation: "relu", "relu2" (relu squared), "gelu" (by erf), "gelu_tanh" (its tanh form);
            gated: "swiglu" (silu) and "geglu" (gelu by erf), which need `gate_weight`.
        gate_weight: (F, C), for gated activations only.
        gate_bias: (F,) or None, for gated activations only.
        addend: (..., F), added before the activation: how LoRA enters.
        recompute: keep nothing but the arguments for the backward, which then does the matrix
            product again: less memory for more time. The numbers are the same.
        impl: which body runs: "auto", "reference" or "triton".

    All tensors have one dtype and device, except under autocast, which casts them. The result is
    (..., F) in that dtype. Differentiable with respect to every tensor, once through the operator
    and any number of times through the plain reference body.

    Raises:
        ValueError: a wrong shape, dtype, device or option.
        KernelUnavailable: impl="triton" where no Triton kernel can run.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.3; Hendrycks and Gimpel 2016,
    arXiv:1606.08415, section 2; Shazeer 2020, arXiv:2002.05202, section 2; So et al. 2021,
    arXiv:2109.08668, section 4 (squared relu).
    """
    if torch._C._is_any_autocast_enabled():
        x, weight = autocast(x.device, x, weight)
        bias, gate_weight, gate_bias, addend = autocast(
            x.device, bias, gate_weight, gate_bias, addend
        )
    _validate(x, weight, bias, activation, gate_weight, gate_bias, addend)
    arguments = (x, weight, bias, gate_weight, gate_bias, addend, activation)
    exporting = torch.compiler.is_exporting()
    if exporting or runs_triton("ffn", impl, x, *arguments):
        recomputed = (True,) if recompute and not exporting else ()
        out: Tensor = library.call("ffn", *arguments, *recomputed)
        return out
    if recompute:
        again: Tensor = checkpoint(
            reference.ffn, *arguments, use_reentrant=False, preserve_rng_state=False
        )
        return again
    return reference.ffn(*arguments)


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    addend: Tensor | None,
) -> None:
    check_float("x", x)
    if x.ndim == 0:
        raise wrong("x", shape(x), "(..., C)")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise wrong("weight", shape(weight), f"(F, C) with C = {x.shape[-1]} as x")
    if activation not in reference.ACTIVATIONS:
        raise wrong("activation", repr(activation), f"one of {', '.join(reference.ACTIVATIONS)}")
    check_like("weight", weight, "x", x)
    F = weight.shape[0]
    if bias is not None:
        check_shape("bias", bias, "(F,)", F)
        check_like("bias", bias, "x", x)
    gated = activation in reference.GATED
    if gated != (gate_weight is not None):
        found, expected = ("None", "an (F, C) tensor") if gated else ("given", "None")
        raise wrong("gate_weight", found, f"{expected} for activation {activation!r}")
    if gate_weight is not None:
        check_shape("gate_weight", gate_weight, "(F, C)", *weight.shape)
        check_like("gate_weight", gate_weight, "x", x)
    if gate_bias is not None:
        if not gated:
            raise wrong("gate_bias", "given", f"None for activation {activation!r}")
        check_shape("gate_bias", gate_bias, "(F,)", F)
        check_like("gate_bias", gate_bias, "x", x)
    if addend is not None:
        check_shape("addend", addend, "(..., F)", *x.shape[:-1], F)
        check_like("addend", addend, "x", x)
