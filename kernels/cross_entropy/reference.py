"""What cross_entropy means, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptopt.kernels.dtypes import wide


def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    """The loss of the linear head's logits, in float32 or wider."""
    logits = F.linear(hidden, head_weight).reshape(-1, head_weight.shape[0])  # (N, V)
    logits = logits.to(wide(logits))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = targets.reshape(-1)  # (N,)
    per_token = z_loss > 0.0 or reduction == "none"
    loss = F.cross_entropy(
        logits,
        flat,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if per_token else "sum",
    )
    if z_loss > 0.0:
        z = z_loss * torch.logsumexp(logits, dim=-1).square()
        loss = loss + z.masked_fill(flat == ignore_index, 0.0)
    if reduction == "none":
        return loss.view(targets.shape)
    loss = loss.sum() if per_token else loss
    # torch's own mean is 0 / 0 where every target is ignored; here that loss is 0.
    return loss if reduction == "sum" else loss / (flat != ignore_index).sum().clamp(min=1)
