"""Peers of attention_decode: append to a fixed cache, then attend to what each row holds."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptopt.bench.cases import Case
from gptopt.bench.contenders import EAGER, Contender, compiled
from gptopt.bench.operators import Body, Call, Inputs, Outputs


def contenders(case: Case, body: Body) -> list[Contender]:
    """Everyone beside our own body."""
    return [Contender(EAGER, _eager), compiled(_eager)]


def _eager(case: Case, inputs: Inputs) -> Call:
    keys, values, lengths = (inputs.fixed[name] for name in ("keys", "values", "lengths"))
    grouped = case.sizes["H"] != case.sizes["K"]
    rows = torch.arange(case.sizes["B"], device=keys.device)
    places = torch.arange(case.sizes["S"], device=keys.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        keys[rows, :, lengths] = k[:, :, 0]
        values[rows, :, lengths] = v[:, :, 0]
        seen = (places <= lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        return (
            F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=grouped),
        )

    return call
