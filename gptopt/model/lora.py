"""LoRA: a small trainable product beside a linear layer whose own weights stay as they are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptopt.kernels import dropout


class Base(NamedTuple):
    """The model that an adapter stands on.

    Attributes:
        name: its folder, or its name on the hub, as PEFT's base_model_name_or_path has it.
        sha256: of its weights; None where an adapter does not tell.
    """

    name: str
    sha256: str | None


class Part(NamedTuple):
    """Rows of a layer that are one projection: q, k and v may lie in one layer, under each other.

    Attributes:
        name: what transformers calls the projection (gptopt.hf), without its prefix.
        start, rows: where it lies.
    """

    name: str
    start: int
    rows: int


class LowRank(nn.Module):
    """What LoRA adds to a linear layer: scale * dropout(x) A^T B^T for each adapted part of it.

    B begins as zeros, so that an untrained adapter changes no bit of the output.

    Args:
        layer: the layer it stands beside; only its sizes and its place are read.
        parts: the adapted ones, in their order; the rows of others get zeros.
        rank: r, rows of each A.
        scale: alpha / r.
        dropout_p: of what enters A, while training.
        number: of this module in its model, so that no two draw the same dropout mask.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    def __init__(
        self,
        layer: nn.Linear,
        parts: Sequence[Part],
        *,
        rank: int,
        scale: float,
        dropout_p: float = 0.0,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.width = layer.out_features
        self.scale = scale
        self.dropout = dropout_p
        self.number = number

        def empty(*sizes: int) -> nn.Parameter:
            return nn.Parameter(layer.weight.new_empty(sizes))

        self.a = nn.ParameterList(empty(rank, layer.in_features) for _ in parts)
        self.b = nn.ParameterList(empty(part.rows, rank) for part in parts)
        for a, b in zip(self.a, self.b, strict=True):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear draws its own
            nn.init.zeros_(b)

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """x (..., C) -> (..., width); without a seed nothing is dropped."""
        if self.dropout and seed is not None:
            x = dropout(x, self.dropout, seed + self.number)
        pieces: list[Tensor] = []
        end = 0
        for part, a, b in zip(self.parts, self.a, self.b, strict=True):
            piece = F.linear(F.linear(x, a), b) * self.scale  # (..., rows)
            if part.start > end:
                pieces.append(piece.new_zeros((*piece.shape[:-1], part.start - end)))
            pieces.append(piece)
            end = part.start + part.rows
        if end < self.width:
            pieces.append(piece.new_zeros((*piece.shape[:-1], self.width - end)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def update(self) -> Tensor:
        """What the layer's weight would have to gain: scale * B A, (width, C)."""
        whole: Tensor = self.a[0].new_zeros((self.width, self.a[0].shape[1]))
        for part, a, b in zip(self.parts, self.a, self.b, strict=True):
            whole[part.start : part.start + part.rows] = self.scale * (b @ a)
        return whole


def adapted(layer: nn.Module, lora: LowRank | None, x: Tensor, seed: Tensor | None) -> Tensor:
    """What a layer says of x, with what LoRA adds to it."""
    y: Tensor = layer(x)
    return y if lora is None else y + lora(x, seed)
