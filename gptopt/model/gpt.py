"""The reference GPT: token embedding, positions, blocks, final norm, head; written once, against
the operators, so that one model trains, decodes and exports.
"""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptopt.config import LoraOptions, ModelConfig
from gptopt.kernels import StaticCache, cross_entropy, dropout
from gptopt.model.block import (
    SEEDS_PER_BLOCK,
    Block,
    Cache,
    Impl,
    Norm,
    Shared,
    is_plain,
)
from gptopt.model.embeddings import (
    alibi_slopes,
    count_positions,
    document_positions,
    rotary_tables,
    sinusoids,
)
from gptopt.model.lora import Base

logger = logging.getLogger(__name__)

INIT_STD = 0.02


class ModelOutput(NamedTuple):
    """What one forward pass returns; what was not asked for is None."""

    logits: Tensor | None  # (B, T, V), or the last logits_to_keep of T
    loss: Tensor | None  # () mean over the targets that count
    present: list[Cache] | None  # per layer keys and values, each (B, K, P + T, D)


class GPT(nn.Module):
    """A GPT as its configuration describes it.

    Args:
        config: the shape; `vocab_size` must be set.
        kernels: which operator bodies run; a choice of this run, never saved with the weights.

    Raises:
        ValueError: vocab_size is not set.
    """

    def __init__(self, config: ModelConfig, *, kernels: Impl = "auto") -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set; take the tokenizer's size, padded to 64")
        self.config = config
        self.kernels = kernels
        # The forward pass reads plain attributes: torch.compile does not follow pydantic models.
        self.position = config.position
        self.head_dim, self.n_head = config.head_size, config.n_head
        self.n_layer, self.n_embd = config.n_layer, config.n_embd
        self.block_size = config.block_size
        self.rotary_base = config.rotary_base
        self.logit_softcap = config.logit_softcap
        self.causal = config.causal
        self.dropout = config.dropout
        self.lora: LoraOptions | None = None  # what gptopt.lora put beside its layers
        self.lora_dropout = 0.0
        self.base: Base | None = None  # what such an adapter stands on
        self.post = config.norm_position == "post"
        self._told = False

        C, V = config.n_embd, config.vocab_size
        self.wte = nn.Embedding(V, C)
        self.wpe = nn.Embedding(self.block_size, C) if self.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config, kernels) for _ in range(self.n_layer))
        # A post-norm stack ends in a norm already.
        self.norm = (
            None
            if self.post
            else Norm(C, kind=config.norm, bias=config.bias, eps=config.norm_eps, impl=kernels)
        )
        # A tied head is the token embedding itself: one parameter, one name.
        self.head = None if config.tie_head else nn.Linear(C, V, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights anew, as GPT-2's.

        Matrices and embeddings N(0, 0.02), biases 0, norms 1; the two projections that write into
        the residual stream are narrower by sqrt(2 n_layer).

        Source: Radford et al. 2019 (GPT-2), section 2.3.
        """
        residual_std = INIT_STD / math.sqrt(2 * self.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith(("attn.proj.weight", "ffn.down.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def num_parameters(self) -> int:
        """Parameters, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def drops(self) -> bool:
        """Whether training this model draws dropout masks."""
        return self.dropout > 0 or self.lora_dropout > 0

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        doc_ids: Tensor | None = None,
        past: Sequence[Cache] | StaticCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        seed: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
    ) -> ModelOutput:
        """Logits of the next tokens, or with targets their loss.

        Args:
            ids: (B, T) int64 tokens.
            targets: (B, T) int64, the token that each position should say; the loss is computed
                without ever holding the logits, which are then None.
            attention_mask: (B, S) bool or int, nonzero = real token, S = P + T.
            position_ids: (B, T) int64. Without them real tokens are counted from 0, so padding on
                either side shifts nothing; without a mask they are P .. P + T - 1. With doc_ids
                they begin at 0 with every document.
            doc_ids: (B, S) int, attention stays within equal ids, which lie side by side.
            past: per layer the keys and values of P earlier tokens, each (B, K, P, D). Or a
                StaticCache, for generation: it is written in place behind each row's own tokens,
                and counting them (StaticCache.advance) is the caller's.
            use_cache: return `present`, the `past` of the next call.
            logits_to_keep: logits of the last so many positions only; 0 is all.
            seed: () int64 for dropout; without one it is drawn from torch's CPU generator.
            label_smoothing: as in `gptopt.kernels.cross_entropy`.
            z_loss: likewise.
            ignore_index: targets of this value do not count.

        Raises:
            ValueError: a shape does not fit, or a position lies beyond block_size.
        """
        x, present = self.hidden(
            ids, attention_mask=attention_mask, position_ids=position_ids, doc_ids=doc_ids,
            past=past, use_cache=use_cache, seed=seed,
        )  # fmt: skip
        cached = present if use_cache else None
        if targets is not None:
            loss = self._loss(x, targets, label_smoothing, z_loss, ignore_index)
            return ModelOutput(None, loss, cached)
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        return ModelOutput(self._logits(x), None, cached)

    def hidden(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        doc_ids: Tensor | None = None,
        past: Sequence[Cache] | StaticCache | None = None,
        use_cache: bool = False,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, list[Cache]]:
        """What the head reads (B, T, C), and with use_cache the cache; see `forward`."""
        lengths = past.lengths if isinstance(past, StaticCache) else None
        P = 0 if past is None or lengths is not None else past[0][0].shape[2]
        key_mask = None if attention_mask is None else attention_mask.bool()
        if not torch.compiler.is_exporting():
            self._check_inputs(ids, key_mask, past, use_cache, P)
            if isinstance(past, StaticCache):
                self._check_static(past, key_mask, doc_ids, use_cache)
        shared, positions = self._shared(ids, key_mask, position_ids, doc_ids, P, lengths)
        *seeds, lora_seed = self._seeds(seed, ids.device)
        shared = shared._replace(lora_seed=lora_seed)

        x = self._embed(ids, positions, seeds[0])
        residual: Tensor | None = None
        present: list[Cache] = []
        for i, block in enumerate(self.blocks):
            layer_seeds = seeds[SEEDS_PER_BLOCK * i : SEEDS_PER_BLOCK * (i + 1) + 1]
            layer_past = None if past is None else past[i]
            x, residual, cache = block(x, residual, shared, layer_past, layer_seeds)
            if use_cache:
                present.append(cache)
        if self.norm is not None:
            x, _ = self.norm(x, residual, self._dropout_p(seeds), seeds[-1])  # (B, T, C)
        return x, present

    def _shared(
        self,
        ids: Tensor,
        key_mask: Tensor | None,
        position_ids: Tensor | None,
        doc_ids: Tensor | None,
        P: int,
        lengths: Tensor | None,
    ) -> tuple[Shared, Tensor | None]:
        """What all blocks read, and the position ids (B | 1, T) where this model needs any."""
        positions = cos = sin = slopes = None
        if self.position == "alibi":
            slopes = alibi_slopes(self.n_head, ids.device)
        elif self.position != "none":
            if position_ids is not None:
                positions = position_ids
            elif doc_ids is not None:
                positions = document_positions(doc_ids)[:, P:]
            elif key_mask is not None:
                positions = count_positions(key_mask, P)
            else:
                positions = torch.arange(P, P + ids.shape[1], device=ids.device)[None]
                positions = positions if lengths is None else positions + lengths[:, None]
            if self.position == "rotary":
                cos, sin = rotary_tables(positions, self.head_dim, self.rotary_base)
            else:
                self._check_positions(positions, P + ids.shape[1], position_ids is not None)
        return Shared(key_mask, doc_ids, cos, sin, slopes, lengths), positions

    def _embed(self, ids: Tensor, positions: Tensor | None, seed: Tensor | None) -> Tensor:
        """Token vectors with what learned or sinusoidal positions add: (B, T, C)."""
        x: Tensor = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        elif self.position == "sinusoidal" and positions is not None:
            # The paper scales the token vectors up to the size of the sinusoids (section 3.4).
            x = x * math.sqrt(self.n_embd) + sinusoids(positions, self.n_embd).to(x.dtype)
        # Where the first block begins with a norm, that norm drops out what it reads.
        return dropout(x, self.dropout, seed) if self.post and seed is not None else x

    def _logits(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, V)."""
        logits = F.linear(x, self.wte.weight) if self.head is None else self.head(x)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def _loss(
        self, x: Tensor, targets: Tensor, smoothing: float, z_loss: float, ignore_index: int
    ) -> Tensor:
        if self.head is not None and not is_plain(self.head):
            return self._composed_loss(x, targets, smoothing, z_loss, ignore_index)
        weight = self.wte.weight if self.head is None else self.head.weight
        return cross_entropy(
            x, weight, targets,
            ignore_index=ignore_index, label_smoothing=smoothing, z_loss=z_loss,
            softcap=self.logit_softcap, impl=self.kernels,
        )  # fmt: skip

    def _composed_loss(
        self, x: Tensor, targets: Tensor, smoothing: float, z_loss: float, ignore_index: int
    ) -> Tensor:
        """The same loss through the head as it is, whatever a user made of it."""
        if not self._told and not torch.compiler.is_compiling():
            self._told = True
            logger.warning(
                "head: the layer is wrapped or carries hooks, so it is called as it is and the "
                "logits are held, without the fused loss"
            )
        logits = self._logits(x).flatten(0, -2)  # (B T, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels = targets.flatten()
        loss = F.cross_entropy(
            logits, labels, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum"
        )
        counts = labels != ignore_index
        if z_loss:
            loss = loss + z_loss * logits.logsumexp(-1).square().masked_fill(~counts, 0.0).sum()
        return loss / counts.sum().clamp(min=1)

    def _dropout_p(self, seeds: Sequence[Tensor | None]) -> float:
        return self.dropout if seeds[0] is not None else 0.0

    def _seeds(self, seed: Tensor | None, device: torch.device) -> tuple[Tensor | None, ...]:
        """A seed of its own for every use of dropout, None where there is none; the last is LoRA's.

        LoRA's modules count on from theirs.
        """
        count = SEEDS_PER_BLOCK * self.n_layer + 1
        if not self.training or not self.drops:
            return (None,) * (count + 1)
        if seed is None:
            seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
        numbers = torch.arange(count + 1, device=device)
        *own, lora = (seed.to(device, non_blocking=True) + numbers).unbind()
        return (
            *(own if self.dropout else (None,) * count),
            lora if self.lora_dropout else None,
        )

    def _check_inputs(
        self,
        ids: Tensor,
        key_mask: Tensor | None,
        past: Sequence[Cache] | StaticCache | None,
        use_cache: bool,
        P: int,
    ) -> None:
        if ids.dim() != 2:
            raise ValueError(f"ids: expected shape (B, T), found {tuple(ids.shape)}")
        if past is not None and len(past) != self.n_layer:
            raise ValueError(f"past: expected {self.n_layer} layers, found {len(past)}")
        if not self.causal and (past is not None or use_cache):
            raise ValueError(
                "a bidirectional model has no cache: earlier tokens would have to see later ones"
            )
        expected = (ids.shape[0], P + ids.shape[1])
        if key_mask is not None and key_mask.shape != expected:
            raise ValueError(
                f"attention_mask: expected shape (B, P + T) = {expected}, "
                f"found {tuple(key_mask.shape)}"
            )

    def _check_static(
        self,
        cache: StaticCache,
        key_mask: Tensor | None,
        doc_ids: Tensor | None,
        use_cache: bool,
    ) -> None:
        if key_mask is not None or doc_ids is not None or use_cache:
            raise ValueError(
                "a StaticCache goes without attention_mask, doc_ids and use_cache: its rows have no"
                " padding, and it is written in place"
            )
        if cache.max_tokens > self.block_size:
            raise ValueError(
                f"past: rows of {cache.max_tokens} tokens are beyond block_size={self.block_size}"
            )

    def _check_positions(self, positions: Tensor, S: int, given: bool) -> None:
        """Raise where a position lies beyond block_size, without looking at values in vain."""
        if torch.compiler.is_compiling() or (self.block_size >= S and not given):
            return
        last = int(positions.max())
        if last >= self.block_size:
            raise ValueError(
                f"position {last} is beyond block_size={self.block_size}: "
                f"{self.position} positions end there; shorten the input or slide the window"
            )
