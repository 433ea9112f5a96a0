"""layernorm: LayerNorm or RMSNorm, fused with the dropout and the residual sum that precede it."""

from typing import Literal

import torch
from torch import Tensor

from gptopt.kernels import library
from gptopt.kernels.checks import (
    check_dropout,
    check_float,
    check_shape,
    shape,
    wrong,
)
from gptopt.kernels.layernorm import op as _op  # noqa: F401 - registers gptopt::layernorm
from gptopt.kernels.layernorm import reference
from gptopt.kernels.select import Impl, runs_triton

__all__ = ["layernorm"]


def layernorm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    kind: Literal["layer", "rms"] = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (y, new_residual): new_residual = dropout(x) + residual, y = its norm.

    "layer": y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias, over the last dimension, with
    the biased variance. "rms": y = h / sqrt(mean(h^2) + eps) * weight + bias. Statistics are
    float32 for lower precision and float64 for float64.

    Args:
        x: (..., C) float32, bfloat16, float16 or float64, any strides.
        weight: (C,) or None. May be float32 beside a lower-precision `x`.
        bias: (C,) or None.
        residual: of the shape of `x`, or None for no sum. The sum has the wider of the two dtypes.
        kind: "layer" or "rms".
        eps: added under the root, > 0.
        dropout_p: probability that an element of `x` is zeroed before the sum; the others are
            scaled by 1 / (1 - dropout_p).
        seed: () int64 tensor, needed where dropout_p > 0 (see gptopt.kernels.philox).
        impl: which body runs: "auto", "reference" or "triton".

    Both results have the shape of `x` and the sum's dtype. Without residual and dropout,
    new_residual is `x` itself. Differentiable with respect to x, weight, bias and residual, once
    through the operator and any number of times through the plain reference body.

    Raises:
        ValueError: a wrong shape, dtype, device or option.
        KernelUnavailable: impl="triton" where no Triton kernel can run.

    Source: Ba et al. 2016, arXiv:1607.06450, section 3; Zhang and Sennrich 2019,
    arXiv:1910.07467, section 4.
    """
    _validate(x, weight, bias, residual, kind, eps)
    check_dropout(dropout_p, seed, x)
    arguments = (x, weight, bias, residual, seed, kind, eps, dropout_p)
    if torch.compiler.is_exporting() or runs_triton("layernorm", impl, x, *arguments):
        y, h = library.call("layernorm", *arguments)
        return y, x if residual is None and dropout_p == 0.0 else h
    return reference.layernorm(*arguments)


def _validate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    eps: float,
) -> None:
    check_float("x", x)
    if x.ndim == 0:
        raise wrong("x", shape(x), "(..., C)")
    if kind not in ("layer", "rms"):
        raise wrong("kind", repr(kind), "'layer' or 'rms'")
    if not eps > 0.0:
        raise wrong("eps", eps, "a number above 0")
    C = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_float(name, parameter)
            check_shape(name, parameter, "(C,)", C)
            if parameter.device != x.device:
                raise wrong(name, f"on {parameter.device}", f"{x.device} as x")
    if residual is not None:
        check_float("residual", residual)
        check_shape("residual", residual, "the shape of x", *x.shape)
        if residual.device != x.device:
            raise wrong("residual", f"on {residual.device}", f"{x.device} as x")
