"""One block of the GPT: attention and ffn, with their norms and residual sums, out of operators.

A residual sum is never an operation of its own: a block hands on its branch `x` and the stream
`residual`, and the next norm adds the two (and drops out `x`) while it reads them.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptopt.config import ModelConfig
from gptopt.kernels import attention, attention_decode, ffn, layernorm, rotary
from gptopt.model.lora import LowRank, adapted

logger = logging.getLogger(__name__)

Impl = Literal["auto", "reference", "triton"]
Cache = tuple[Tensor, Tensor]  # keys and values of one layer, each (B, K, S, D)

# Number of dropout seeds of a block, and their places: the sum read by norm_1, the attention
# probabilities, the sum read by norm_2. The fourth is the next block's first (post-norm needs it).
SEEDS_PER_BLOCK = 3
NO_SEEDS: tuple[None, None, None, None] = (None, None, None, None)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
    "geglu": F.gelu,
}


class Shared(NamedTuple):
    """What every block of one forward pass reads."""

    key_mask: Tensor | None  # (B, S) bool, True = real token
    doc_ids: Tensor | None  # (B, S) int
    cos: Tensor | None  # (B | 1, T, D / 2) fp32
    sin: Tensor | None
    alibi_slopes: Tensor | None  # (H,) fp32
    lengths: Tensor | None = None  # (B,) int tokens in each row of a StaticCache, if past is one
    lora_seed: Tensor | None = None  # () int64, while LoRA's dropout is at work


def is_plain(layer: nn.Module) -> bool:
    """Whether reading a linear layer's weight says all about it: no subclass, hook or wrapper."""
    # A parametrised layer (torch.nn.utils.parametrize) changes its class.
    return type(layer) is nn.Linear and not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


class Norm(nn.Module):
    """layernorm or rmsnorm over the last dimension, reading (x, residual) at once."""

    def __init__(self, width: int, *, kind: str, bias: bool, eps: float, impl: Impl) -> None:
        super().__init__()
        self.kind: Literal["layer", "rms"] = "rms" if kind == "rmsnorm" else "layer"
        self.eps = eps
        self.impl = impl
        self.weight = nn.Parameter(torch.ones(width))
        # An rmsnorm never has a bias (Zhang & Sennrich 2019, arXiv:1910.07467).
        self.bias = nn.Parameter(torch.zeros(width)) if bias and self.kind == "layer" else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(norm(h), h) with h = dropout(x) + residual; all (..., C)."""
        return layernorm(
            x, self.weight, self.bias, residual,
            kind=self.kind, eps=self.eps, dropout_p=dropout_p, seed=seed, impl=self.impl,
        )  # fmt: skip


class Attention(nn.Module):
    """Multi-head, grouped or multi-query self-attention with one fused projection in."""

    def __init__(self, config: ModelConfig, impl: Impl) -> None:
        super().__init__()
        H, K, D = config.n_head, config.kv_heads, config.head_size
        self.n_head, self.n_kv_head, self.head_dim = H, K, D
        self.widths = (H * D, K * D, K * D)
        self.causal = config.causal
        self.window = config.window
        self.softcap = config.attn_softcap
        self.interleaved = config.rotary_interleaved
        self.dropout = config.dropout
        self.impl = impl
        self.qkv = nn.Linear(config.n_embd, sum(self.widths), bias=config.biased_qkv)
        self.proj = nn.Linear(H * D, config.n_embd, bias=config.bias)
        self.qkv_lora: LowRank | None = None  # set by gptopt.lora, as those of the ffn are
        self.proj_lora: LowRank | None = None
        head_norm = partial(Norm, D, kind="rmsnorm", bias=False, eps=config.norm_eps, impl=impl)
        self.q_norm = head_norm() if config.qk_norm else None
        self.k_norm = head_norm() if config.qk_norm else None

    def forward(
        self, x: Tensor, shared: Shared, past: Cache | None, seed: Tensor | None
    ) -> tuple[Tensor, Cache]:
        """x (B, T, C) -> the branch (B, T, C), and the keys and values of all S tokens."""
        B, T, _ = x.shape
        qkv = adapted(self.qkv, self.qkv_lora, x, shared.lora_seed)
        q, k, v = qkv.split(self.widths, dim=-1)
        q = q.view(B, T, self.n_head, self.head_dim)
        k = k.view(B, T, self.n_kv_head, self.head_dim)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        if shared.cos is not None and shared.sin is not None:
            q, k = rotary(
                q, k, shared.cos, shared.sin, interleaved=self.interleaved, impl=self.impl
            )
        if shared.lengths is not None and past is not None:
            present = past  # written in place
            out = attention_decode(
                q, k, v, past, shared.lengths,
                window=self.window, softcap=self.softcap, alibi_slopes=shared.alibi_slopes,
                impl=self.impl,
            )  # fmt: skip
        else:
            out, present, _ = attention(
                q, k, v,
                past=past, key_mask=shared.key_mask, doc_ids=shared.doc_ids, causal=self.causal,
                window=self.window, softcap=self.softcap, alibi_slopes=shared.alibi_slopes,
                dropout_p=self.dropout if seed is not None else 0.0, seed=seed,
                need_lse=False, impl=self.impl,
            )  # fmt: skip
        out = out.transpose(1, 2).reshape(B, T, self.widths[0])
        return adapted(self.proj, self.proj_lora, out, shared.lora_seed), present


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(up(x)) * gate(x)) for gated activations.

    The activated layer is called `up` whether or not there is a gate, as in the `ffn` operator.
    """

    def __init__(self, config: ModelConfig, impl: Impl) -> None:
        super().__init__()
        C, width, bias = config.n_embd, config.ffn_width, config.bias
        self.activation = config.activation
        self.impl = impl
        self.up = nn.Linear(C, width, bias=bias)
        self.gate = nn.Linear(C, width, bias=bias) if config.gated else None
        self.down = nn.Linear(width, C, bias=bias)
        self.up_lora: LowRank | None = None
        self.gate_lora: LowRank | None = None
        self.down_lora: LowRank | None = None
        self._told = False

    def forward(self, x: Tensor, lora_seed: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        gate = self.gate
        if not is_plain(self.up) or not (gate is None or is_plain(gate)):
            self._tell("a layer is wrapped or carries hooks, so it is called as it is")
            hidden = self._composed(x, lora_seed)
        elif self.gate_lora is not None:
            self._tell("LoRA is on the gate, where the operator takes no addend")
            hidden = self._composed(x, lora_seed)
        else:
            hidden = ffn(
                x, self.up.weight, self.up.bias,
                activation=self.activation,
                gate_weight=None if gate is None else gate.weight,
                gate_bias=None if gate is None else gate.bias,
                addend=None if self.up_lora is None else self.up_lora(x, lora_seed),
                impl=self.impl,
            )  # (B, T, F)  # fmt: skip
        return adapted(self.down, self.down_lora, hidden, lora_seed)

    def _composed(self, x: Tensor, lora_seed: Tensor | None) -> Tensor:
        """The same function through the layers themselves, whatever a user made of them."""
        hidden = _ACTIVATIONS[self.activation](adapted(self.up, self.up_lora, x, lora_seed))
        if self.gate is None:
            return hidden
        return hidden * adapted(self.gate, self.gate_lora, x, lora_seed)

    def _tell(self, reason: str) -> None:
        if not self._told and not torch.compiler.is_compiling():
            self._told = True
            logger.warning("ffn: %s, without the fused operator", reason)


class Block(nn.Module):
    """Attention and ffn around the residual stream, normed before, after, or on both sides.

    pre: x + sub(norm(x)); post: norm(x + sub(x)); sandwich: x + norm_out(sub(norm(x))).
    """

    def __init__(self, config: ModelConfig, impl: Impl) -> None:
        super().__init__()
        self.post = config.norm_position == "post"
        self.dropout = config.dropout
        norm = partial(
            Norm, config.n_embd,
            kind=config.norm, bias=config.bias, eps=config.norm_eps, impl=impl,
        )  # fmt: skip
        sandwich = config.norm_position == "sandwich"
        self.norm_1 = norm()
        self.attn = Attention(config, impl)
        self.norm_1_out = norm() if sandwich else None
        self.norm_2 = norm()
        self.ffn = FeedForward(config, impl)
        self.norm_2_out = norm() if sandwich else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        shared: Shared,
        past: Cache | None = None,
        seeds: Sequence[Tensor | None] = NO_SEEDS,
    ) -> tuple[Tensor, Tensor | None, Cache]:
        """(x, residual), each (B, T, C) -> (x, residual, present).

        The stream that the block reads and hands on is dropout(x) + residual, still to be summed by
        the next norm. Post-norm blocks sum their own, so their residual is None.
        """
        p = self.dropout if seeds[0] is not None else 0.0
        if self.post:
            y, present = self.attn(x, shared, past, seeds[1])
            x, _ = self.norm_1(y, x, p, seeds[2])
            x, _ = self.norm_2(self.ffn(x, shared.lora_seed), x, p, seeds[3])
            return x, None, present
        y, residual = self.norm_1(x, residual, p, seeds[0])
        y, present = self.attn(y, shared, past, seeds[1])
        if self.norm_1_out is not None:
            y, _ = self.norm_1_out(y)
        y, residual = self.norm_2(y, residual, p, seeds[2])
        y = self.ffn(y, shared.lora_seed)
        if self.norm_2_out is not None:
            y, _ = self.norm_2_out(y)
        return y, residual, present
