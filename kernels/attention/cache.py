"""The key/value cache of fixed size that `attention_decode` writes in place."""

import torch
from torch import Tensor


class StaticCache:
    """Keys and values of every layer, and how many tokens each row holds.

    The buffers never move and never grow, so that a decode step can be captured once as a CUDA
    graph. Rows may hold different numbers of tokens: row b of every layer holds tokens
    0 .. lengths[b] - 1.

    Args:
        n_layer: number of layers.
        batch_size: B rows.
        n_kv_head: K key/value heads.
        max_tokens: M, the most tokens a row can hold.
        head_dim: D channels per head.
        device: where the buffers live.
        dtype: of the keys and values.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        n_kv_head: int,
        max_tokens: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        sizes = (n_layer, batch_size, n_kv_head, max_tokens, head_dim)
        if min(sizes) < 1:
            raise ValueError(
                f"StaticCache sizes are {sizes}, expected n_layer, batch_size, n_kv_head,"
                " max_tokens and head_dim of at least 1"
            )
        shape = (n_layer, 2, batch_size, n_kv_head, max_tokens, head_dim)
        self._buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)  # (B,)
        self.max_tokens = max_tokens

    def __len__(self) -> int:
        return self._buffer.shape[0]

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer, each (B, K, M, D): views, not copies."""
        return self._buffer[layer, 0], self._buffer[layer, 1]

    def advance(self, tokens: int | Tensor) -> None:
        """Count `tokens` (one number, or (B,) per row) that every layer has written."""
        self.lengths += tokens

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.lengths.zero_()
