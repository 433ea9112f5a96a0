"""Peers of attention: the formula in plain PyTorch, SDPA's back ends by name, FlexAttention."""

import contextlib
from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import deterministic as _memory

from gptopt.bench.cases import Case
from gptopt.bench.contenders import (
    CUDNN,
    DETERMINISTIC,
    EAGER,
    FLASH,
    FLEX,
    Contender,
    Unavailable,
    compile_call,
    compiled,
)
from gptopt.bench.operators import Body, Call, Inputs, Outputs, own_call


def contenders(case: Case, body: Body) -> list[Contender]:
    """Everyone beside our own body."""
    return [
        Contender(
            DETERMINISTIC,
            lambda case, inputs: own_call(case, inputs, body),
            around=_deterministic,
            phases=("backward", "full"),
        ),
        Contender(FLASH, lambda case, inputs: _sdpa(case, SDPBackend.FLASH_ATTENTION)),
        Contender(CUDNN, _cudnn),
        Contender(EAGER, _eager),
        compiled(_eager),
        Contender(FLEX, _flex, compiles=True),
    ]


def _eager(case: Case, inputs: Inputs) -> Call:
    scale, group = 1 / sqrt(case.sizes["D"]), case.sizes["H"] // case.sizes["K"]
    T, device = case.sizes["T"], inputs.leaves[0].device
    hidden = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
    causal = bool(case.options["causal"])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = (q @ k.transpose(-2, -1)) * scale  # (B, H, T, T)
        if causal:
            scores = scores.masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v,)

    return call


def _sdpa(case: Case, backend: SDPBackend) -> Call:
    causal, grouped = bool(case.options["causal"]), case.sizes["H"] != case.sizes["K"]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped),)

    return call


def _cudnn(case: Case, inputs: Inputs) -> Call:
    if inputs.leaves[0].device.type != "cuda":
        raise Unavailable("cuDNN needs a GPU")
    return _sdpa(case, SDPBackend.CUDNN_ATTENTION)


def _flex(case: Case, inputs: Inputs) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, device = case.sizes["T"], inputs.leaves[0].device
    grouped = case.sizes["H"] != case.sizes["K"]
    mask = None
    if case.options["causal"]:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=str(device))
    flex = compile_call(flex_attention)
    return lambda q, k, v: (flex(q, k, v, block_mask=mask, enable_gqa=grouped),)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms, without the filling of fresh memory that torch does beside them."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = _memory  # its one setting is a property that no type checker sees
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled
