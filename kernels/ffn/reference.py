"""What ffn means, in plain PyTorch."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": _relu2,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
GATED = ("swiglu", "geglu")


def ffn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    addend: Tensor | None,
    activation: str,
) -> Tensor:
    """act(x W^T + b + addend), times (x Wg^T + bg) where there is a gate."""
    return activate(
        *project(x, weight, bias, gate_weight, gate_bias, addend), activation=activation
    )


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    addend: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What goes into the activation, and the gate."""
    hidden = F.linear(x, weight, bias)
    if addend is not None:
        hidden = hidden + addend
    return hidden, None if gate_weight is None else F.linear(x, gate_weight, gate_bias)


def activate(hidden: Tensor, gate: Tensor | None, *, activation: str) -> Tensor:
    """The elementwise end of the operator."""
    active = ACTIVATIONS[activation](hidden)
    return active if gate is None else active * gate
