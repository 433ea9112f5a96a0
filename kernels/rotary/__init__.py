"""rotary: positions as rotations of the queries and keys."""

import torch
from torch import Tensor

from gptopt.kernels import library
from gptopt.kernels.checks import check_float, check_like, shape, wrong
from gptopt.kernels.rotary import op as _op  # noqa: F401 - registers gptopt::rotary
from gptopt.kernels.rotary import reference
from gptopt.kernels.select import Impl, runs_triton

__all__ = ["rotary"]


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return q and k with each pair of channels rotated by its token's angle.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin), computed in the wider of the dtypes of
    the tensor and of cos, and rounded once.

    Args:
        q: (B, H, T, D) float32, bfloat16, float16 or float64, any strides.
        k: (B, K, T, D) like `q`.
        cos: (B, T, R) or (1, T, R) with R <= D / 2, float32 or wider than `q`. A constant.
        sin: like `cos`.
        interleaved: pairs are channels (2i, 2i + 1); otherwise (i, i + R). Only the first 2R
            channels rotate, the others pass.
        impl: which body runs: "auto", "reference" or "triton".

    The results have the shapes and dtypes of q and k. Differentiable with respect to q and k.

    Raises:
        ValueError: a wrong shape, dtype or device, or cos or sin that wants a gradient.
        KernelUnavailable: impl="triton" where no Triton kernel can run.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2.
    """
    _validate(q, k, cos, sin)
    if torch.compiler.is_exporting() or runs_triton("rotary", impl, q, q, k, cos, sin, interleaved):
        pair: tuple[Tensor, Tensor] = library.call("rotary", q, k, cos, sin, interleaved)
        return pair
    return reference.rotary(q, k, cos, sin, interleaved)


def _validate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_float("q", q)
    if q.ndim != 4:
        raise wrong("q", shape(q), "(B, H, T, D)")
    B, _, T, D = q.shape
    if k.ndim != 4 or k.shape[0] != B or k.shape[2:] != q.shape[2:]:
        raise wrong("k", shape(k), f"(B, K, T, D) = ({B}, K, {T}, {D})")
    check_like("k", k, "q", q)
    if cos.ndim != 3 or cos.shape[0] not in (1, B) or cos.shape[1] != T:
        raise wrong("cos", shape(cos), f"(B or 1, T, R) = ({B} or 1, {T}, R)")
    if 2 * cos.shape[2] > D:
        raise wrong("cos", shape(cos), f"(B or 1, T, R) with R <= D / 2 = {D / 2:g}")
    if sin.shape != cos.shape:
        raise wrong("sin", shape(sin), f"{tuple(cos.shape)} as cos")
    for name, table in (("cos", cos), ("sin", sin)):
        check_float(name, table)
        if table.device != q.device:
            raise wrong(name, f"on {table.device}", f"{q.device} as q")
        if table.requires_grad:
            raise wrong(name, "a tensor that requires a gradient", "a constant: detach it")
