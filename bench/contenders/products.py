"""Peers of ffn and cross_entropy, the operators around a matrix product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptopt.bench.cases import Case
from gptopt.bench.contenders import BOUND, EAGER, LIGER, Contender, compiled, load
from gptopt.bench.operators import Body, Call, Inputs, Outputs


def contenders(case: Case, body: Body) -> list[Contender]:
    """Everyone beside our own body, and the bound."""
    if case.operator == "ffn":
        return [
            Contender(EAGER, _ffn),
            compiled(_ffn),
            Contender(BOUND, _ffn_products, bound=True),
        ]
    return [
        Contender(EAGER, _cross_entropy),
        compiled(_cross_entropy),
        Contender(LIGER, _liger_cross_entropy),
        Contender(BOUND, lambda case, inputs: lambda x, w: (F.linear(x, w),), bound=True),
    ]


def _ffn(case: Case, inputs: Inputs) -> Call:
    def gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        return (F.gelu(F.linear(x, weight, bias), approximate="tanh"),)

    def swiglu(
        x: Tensor, weight: Tensor, bias: Tensor, gate_weight: Tensor, gate_bias: Tensor
    ) -> Outputs:
        return (F.silu(F.linear(x, weight, bias)) * F.linear(x, gate_weight, gate_bias),)

    return swiglu if case.options["activation"] == "swiglu" else gelu_tanh


def _ffn_products(case: Case, inputs: Inputs) -> Call:
    def call(x: Tensor, *parameters: Tensor) -> Outputs:
        return tuple(F.linear(x, weight) for weight in parameters[::2])

    return call


def _cross_entropy(case: Case, inputs: Inputs) -> Call:
    targets = inputs.fixed["targets"]

    def call(hidden: Tensor, weight: Tensor) -> Outputs:
        return (F.cross_entropy(F.linear(hidden, weight).float(), targets),)

    return call


def _liger_cross_entropy(case: Case, inputs: Inputs) -> Call:
    targets = inputs.fixed["targets"]
    (function,) = load(
        "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
    )

    def call(hidden: Tensor, weight: Tensor) -> Outputs:
        found = function.apply(hidden, weight, targets)
        loss: Tensor = found[0] if isinstance(found, tuple) else found
        return (loss.to(torch.float32),)

    return call
