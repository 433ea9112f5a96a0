"""What layernorm means, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from gptopt.kernels.dtypes import wide
from gptopt.kernels.philox import drop


def layernorm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) with h = dropout(x) + residual; h is `x` itself where nothing changes it."""
    h = x
    if dropout_p > 0.0:
        assert seed is not None
        h = drop(h, dropout_p, seed)
    if residual is not None:
        h = h + residual
    return norm(h, weight, bias, kind, eps), h


def norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """Normalise the last dimension of `h`; the result has the dtype of `h`."""
    C = h.shape[-1:]
    # torch's norms keep their statistics in float32 below it, but want one dtype throughout.
    if any(p is not None and p.dtype != h.dtype for p in (weight, bias)):
        weight = None if weight is None else weight.to(wide(h))
        bias = None if bias is None else bias.to(wide(h))
        return norm(h.to(wide(h)), weight, bias, kind, eps).to(h.dtype)
    if kind == "layer":
        y = F.layer_norm(h, C, weight, bias, eps)
    else:
        y = F.rms_norm(h, C, weight, eps)
        y = y if bias is None else y + bias
    return y if y.dtype == h.dtype else y.to(h.dtype)  # autocast gives float32
