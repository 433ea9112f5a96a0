"""Names and shapes of an exported graph: what every client may rely on, in one place."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gptopt.config import ModelConfig
from gptopt.config_classifier import labels_of, says_next

Dims = tuple[int | str | None, ...]

BATCH = "batch_size"
SEQUENCE = "sequence_length"  # T, the new tokens
PAST = "past_sequence_length"  # P, the tokens in the cache
TOTAL = "total_sequence_length"  # S = P + T
CAPACITY = "max_sequence_length"  # M, the columns of a static cache, at least S

KEEP = "num_logits_to_keep"  # optional input: how many last positions are scored, 0: all
NEXT = "next_tokens"  # optional output (batch_size, 1), in the form of the next input_ids
# Optional inputs of a graph that draws the next token, and their defaults. top_k 0 is no limit,
# temperature 0 the likeliest token.
SAMPLING: dict[str, Any] = {
    "seed": np.array([0], np.int64), "temperature": np.array([1], np.float32),
    "top_k": np.array([50], np.int64), "top_p": np.array([1], np.float32),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """Inputs and outputs of the graph, in order, with the names clients know them by.

    A causal model has a cache: layer i reads past_key_values.{i}.key|value and writes
    present.{i}.key|value. A bidirectional one has none, and its mask is as long as its input.
    A static cache comes back as long as it came in. The next token is an output where it is asked
    for, behind all others. A model that labels text has no cache either, and scores its labels.
    """

    n_layer: int
    kv_heads: int
    head_size: int
    vocab_size: int
    causal: bool  # and so with a cache
    labels: int = 0
    static: bool = False
    next_token: bool = False

    @classmethod
    def of(cls, config: ModelConfig, *, static: bool = False, next_token: bool = False) -> Self:
        """The contract of a model with these sizes."""
        assert config.vocab_size is not None
        return cls(
            n_layer=config.n_layer,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            vocab_size=config.vocab_size,
            causal=says_next(config),
            labels=len(labels_of(config) or ()),
            static=static,
            next_token=next_token,
        )

    def inputs(self) -> dict[str, Dims]:
        """Input name -> dimensions. Tokens, mask and positions are int64, the cache is float."""
        mask = TOTAL if self.causal else SEQUENCE
        tokens = {
            "input_ids": (BATCH, SEQUENCE),
            "attention_mask": (BATCH, mask),
            "position_ids": (BATCH, SEQUENCE),
        }
        return tokens | self._cache("past_key_values", CAPACITY if self.static else PAST)

    def outputs(self) -> dict[str, Dims]:
        """Output name -> dimensions, all float."""
        scored = (BATCH, self.labels) if self.labels else (BATCH, SEQUENCE, self.vocab_size)
        logits: dict[str, Dims] = {"logits": scored}
        chosen: dict[str, Dims] = {NEXT: (BATCH, None)} if self.next_token else {}
        return logits | self._cache("present", CAPACITY if self.static else TOTAL) | chosen

    def _cache(self, name: str, length: str) -> dict[str, Dims]:
        layers = range(self.n_layer if self.causal else 0)
        dims = (BATCH, self.kv_heads, length, self.head_size)
        return {f"{name}.{i}.{part}": dims for i in layers for part in ("key", "value")}
