"""cross_entropy: the linear head and the loss in one operator, so that logits need not be kept."""

from typing import Literal

import torch
from torch import Tensor

from gptopt.kernels import library
from gptopt.kernels.checks import check_float, check_like, check_shape, shape, wrong
from gptopt.kernels.cross_entropy import op as _op  # noqa: F401 - registers gptopt::cross_entropy
from gptopt.kernels.cross_entropy import reference
from gptopt.kernels.dtypes import autocast
from gptopt.kernels.select import Impl, runs_triton

__all__ = ["cross_entropy"]


def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Return the cross-entropy, in nats, of the logits hidden W^T against the targets.

    Per token, with logits s after the softcap: (1 - e) * (lse(s) - s[target])
    + e * (lse(s) - mean(s)) + z_loss * lse(s)^2, with e = label_smoothing.

    Args:
        hidden: (..., C) float32, bfloat16, float16 or float64, any strides.
        head_weight: (V, C) of the same dtype (autocast casts both).
        targets: (...) int64 in [0, V), or `ignore_index`. Out of range is an IndexError on a CPU
            and a device-side assertion on a GPU: checking costs a wait for the device. In the
            Triton body the loss and the gradients become NaN, and it is an assertion only with
            TRITON_DEBUG=1.
        ignore_index: tokens with this target have no loss and no gradient.
        label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1].
        z_loss: weight of lse^2, which keeps the logits near 0; >= 0.
        softcap: c in s = c * tanh(s / c), > 0, or None.
        reduction: "mean" over the tokens that count (0 if none does), "sum", or "none".
        impl: which body runs: "auto", "reference" or "triton".

    The loss is () or, for "none", of the shape of `targets`; float64 for float64, else float32.
    Differentiable with respect to hidden and head_weight, once through the operator and any number
    of times through the plain reference body.

    Raises:
        ValueError: a wrong shape, dtype, device or option.
        KernelUnavailable: impl="triton" where no Triton kernel can run.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7 (smoothing); Chowdhery et al. 2022,
    arXiv:2204.02311, section 5 (z-loss); Gemma Team 2024, arXiv:2408.00118, section 2 (softcap).
    """
    if torch._C._is_any_autocast_enabled():
        hidden, head_weight = autocast(hidden.device, hidden, head_weight)
    _validate(hidden, head_weight, targets, label_smoothing, z_loss, softcap, reduction)
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    arguments = (hidden, head_weight, targets, *options)
    if torch.compiler.is_exporting() or runs_triton("cross_entropy", impl, hidden, *arguments):
        loss: Tensor = library.call("cross_entropy", *arguments)
        return loss
    return reference.cross_entropy(*arguments)


def _validate(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> None:
    check_float("hidden", hidden)
    if hidden.ndim == 0:
        raise wrong("hidden", shape(hidden), "(..., C)")
    if head_weight.ndim != 2 or head_weight.shape[1] != hidden.shape[-1]:
        raise wrong("head_weight", shape(head_weight), f"(V, C) with C = {hidden.shape[-1]}")
    check_like("head_weight", head_weight, "hidden", hidden)
    if targets.dtype != torch.int64:
        raise wrong("targets", f"of dtype {targets.dtype}", "torch.int64")
    check_shape("targets", targets, "(...) as hidden", *hidden.shape[:-1])
    if targets.device != hidden.device:
        raise wrong("targets", f"on {targets.device}", f"{hidden.device} as hidden")
    if not 0.0 <= label_smoothing <= 1.0:
        raise wrong("label_smoothing", label_smoothing, "0 <= label_smoothing <= 1")
    if not z_loss >= 0.0:
        raise wrong("z_loss", z_loss, "a number >= 0")
    if softcap is not None and not softcap > 0.0:
        raise wrong("softcap", softcap, "a number above 0, or None")
    if reduction not in ("mean", "sum", "none"):
        raise wrong("reduction", repr(reduction), "'mean', 'sum' or 'none'")
