"""A GPT that labels text: the same trunk, and a score for each label of the whole text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptopt.config import ModelConfig
from gptopt.config_classifier import ClassifierConfig
from gptopt.model.block import Impl
from gptopt.model.gpt import GPT, INIT_STD, ModelOutput


class Classifier(GPT):
    """A GPT with one linear layer, without bias, behind the vector that stands for a text.

    As in transformers' models for sequence classification, where pooling is "last".

    Args:
        config: the shape and the labels; the head is tied, so that none is built in vain.
        kernels: which operator bodies run.
    """

    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig, *, kernels: Impl = "auto") -> None:
        if not config.tie_head:
            raise ValueError("tie_head: a classifier has no head of its own; set it to true")
        super().__init__(config, kernels=kernels)
        self.pooling, self.multi_label = config.pooling, config.multi_label
        self.score = nn.Linear(config.n_embd, len(config.labels), bias=False)
        nn.init.normal_(self.score.weight, std=INIT_STD)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        weights: Tensor | None = None,
        seed: Tensor | None = None,
        label_smoothing: float = 0.0,
        **unused: Any,
    ) -> ModelOutput:
        """Scores of the labels (logits), or with targets their loss.

        Args:
            ids: (B, T) int64 tokens.
            targets: (B,) int64, the label of each text; or (B, L) float, of each label 1 or 0.
            attention_mask: (B, T) bool or int, nonzero = real token, padded on either side.
            position_ids: (B, T) int64; none: real tokens counted from 0.
            weights: how much each text (B,), or each label of it (B, L), counts in the loss.
            seed: () int64 for dropout.
            label_smoothing: share of a target that goes to all labels alike.
            unused: what else a GPT takes, and a text that is read at once has no use for; all of it
                must be None, False or 0.

        Returns:
            logits (B, L), or loss ().
        """
        assert not any(unused.values())
        x, _ = self.hidden(ids, attention_mask=attention_mask, position_ids=position_ids, seed=seed)
        scores = self.score(self._pooled(x, attention_mask))
        if targets is None:
            return ModelOutput(scores, None, None)
        return ModelOutput(None, self._label_loss(scores, targets, weights, label_smoothing), None)

    def _pooled(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The vector (B, C) that stands for each text of x (B, T, C)."""
        if attention_mask is None:
            return x[:, -1] if self.pooling == "last" else x.mean(dim=1)
        real = attention_mask.to(torch.int64)
        counted = real.cumsum(dim=1)
        total = counted[:, -1:]
        if self.pooling == "last":
            real = real * (counted == total).to(torch.int64)
            total = torch.ones_like(total)
        share = (real / total.clamp(min=1)).to(x.dtype)  # (B, T)
        return (share[:, None] @ x)[:, 0]

    def _label_loss(
        self, scores: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float
    ) -> Tensor:
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if self.multi_label:
            goal = targets.to(scores.dtype) * (1 - smoothing) + smoothing / 2
            each = F.binary_cross_entropy_with_logits(scores, goal, reduction="none")  # (B, L)
        else:
            each = F.cross_entropy(
                scores, targets, label_smoothing=smoothing, reduction="none"
            )  # (B,)
        return (each if weights is None else each * weights).mean()


def as_classifier(trunk: GPT, config: ClassifierConfig) -> Classifier:
    """A classifier with the weights of a plain model, whose head stays behind; its score is new."""
    model = Classifier(config, kernels=trunk.kernels)
    state = {name: each for name, each in trunk.state_dict().items() if name != "head.weight"}
    missing = model.load_state_dict(state, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["score.weight"], [])
    return model.train(trunk.training)


def model_of(config: ModelConfig, *, kernels: Impl = "auto") -> GPT:
    """The model that a configuration describes, with fresh weights."""
    kind = Classifier if isinstance(config, ClassifierConfig) else GPT
    return kind(config, kernels=kernels)  # type: ignore[arg-type]  # its own kind
