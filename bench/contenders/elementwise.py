"""Peers of layernorm and rotary, the operators that only move memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptopt.bench.cases import Case
from gptopt.bench.contenders import EAGER, LIGER, Contender, compiled, load
from gptopt.bench.operators import Body, Call, Inputs, Outputs

_EPS = 1e-5


def contenders(case: Case, body: Body) -> list[Contender]:
    """Everyone beside our own body."""
    if case.operator == "rotary":
        return [Contender(EAGER, _rotary), compiled(_rotary)]
    return [Contender(EAGER, _norm), compiled(_norm), Contender(LIGER, _liger_norm)]


def _norm(case: Case, inputs: Inputs) -> Call:
    C = (case.sizes["C"],)

    def layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        h = x + residual
        return F.layer_norm(h, C, weight, bias, _EPS), h

    def rms(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        h = x + residual
        return F.rms_norm(h, C, weight, _EPS), h

    return layer if case.options["kind"] == "layer" else rms


def _liger_norm(case: Case, inputs: Inputs) -> Call:
    if case.options["kind"] == "layer":
        (function,) = load("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")

        def layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
            h = x + residual
            return function.apply(h, weight, bias, _EPS), h

        return layer
    (function,) = load("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")

    def rms(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        h = x + residual
        return function.apply(h, weight, _EPS, 0.0, "llama", False), h

    return rms


def _rotary(case: Case, inputs: Inputs) -> Call:
    cos, sin = (inputs.fixed[name][:, None] for name in ("cos", "sin"))  # (1, 1, T, R)

    def rotated(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    def call(q: Tensor, k: Tensor) -> Outputs:
        return rotated(q), rotated(k)

    return call
