"""Distillation: a small model learns what a larger one finds likely, beside what the text says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptopt.card import code, short
from gptopt.checkpoint import LoadedModel, load_model
from gptopt.config import ModelConfig, TrainOptions
from gptopt.errors import UserError
from gptopt.tokenizer import Tokenizer
from gptopt.training.pretraining import NextToken


class Distilled(NextToken):
    """Next tokens, with a teacher's probabilities as a second target.

    The loss is (1 - w) CE(text) + w T^2 KL(teacher || student), both at temperature T, meaned over
    the targets.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    FIXED = (*NextToken.FIXED, "distill")

    def __init__(self, options: TrainOptions) -> None:
        super().__init__(options)
        assert options.distill.teacher is not None
        # Before any data is read, so that a mistake shows at once.
        self._teacher = load_model(options.distill.teacher, device="cpu", kernels=options.kernels)
        self._check_teacher()

    def _check_teacher(self) -> None:
        name, config = self.options.distill.teacher, self._teacher.model.config
        if self._teacher.tokenizer is None:
            raise UserError(
                f"--distill.teacher {name}: has no tokenizer.json, so its ids mean nothing"
            )
        if not config.causal:
            raise UserError(
                f"--distill.teacher {name}: is a masked language model; it knows no next token"
            )
        self.teacher = self._teacher.model.eval().requires_grad_(False)

    def own_tokenizer(self, start: LoadedModel | None) -> Tokenizer | None:
        """A new student reads with its teacher's tokenizer."""
        return super().own_tokenizer(start) or self._teacher.tokenizer

    def open(self, out: Path, start: LoadedModel | None, *, resuming: bool) -> None:
        """The data, which must have been made with the teacher's tokenizer."""
        super().open(out, start, resuming=resuming)
        taught = self._teacher.tokenizer
        assert taught is not None
        if taught.sha256 != self.tokenizer.sha256:
            raise UserError(
                f"--distill.teacher {self.options.distill.teacher}: its tokenizer is not the one of"
                f" {self.options.inputs[0]}; tokenise the text with gptopt tokenize --tokenizer"
                f" {self.options.distill.teacher}"
            )

    def model_config(self, start: LoadedModel | None, *, resuming: bool) -> ModelConfig:
        """The student's shape; the teacher must see as much."""
        config = super().model_config(start, resuming=resuming)
        seen = self._teacher.model.config.block_size
        if config.block_size > seen:
            raise UserError(
                f"--model.block-size {config.block_size}: the teacher sees {seen} tokens; give at"
                f" most that"
            )
        return config

    def loss(
        self, forward: Callable[..., Any], inputs: Mapping[str, Tensor], **keywords: Any
    ) -> Tensor:
        """The mixed loss of one micro-batch, a mean over its targets."""
        targets = inputs["targets"]
        smoothing = keywords.pop("label_smoothing", 0.0)
        keywords.pop("z_loss", None)
        logits = forward(ids=inputs["ids"], **keywords).logits.flatten(0, 1)  # (B T, V)
        plain = F.cross_entropy(logits.float(), targets.flatten(), label_smoothing=smoothing)
        assert self.teacher is not None
        teacher = self.teacher.to(logits.device)
        with torch.no_grad():
            taught = teacher(inputs["ids"]).logits.flatten(0, 1)
        options, V = self.options.distill, self.tokenizer.size  # ids behind it are padding
        wanted, said = (
            F.log_softmax(part[:, :V].float() / options.temperature, dim=-1)
            for part in (taught, logits)
        )
        divergence = F.kl_div(said, wanted, log_target=True, reduction="batchmean")
        mixed: Tensor = torch.lerp(plain, options.temperature**2 * divergence, options.weight)
        return mixed

    def describe(self) -> str:
        """The data, and who teaches."""
        size = self._teacher.model.num_parameters()
        return f"{super().describe()}, taught by {size:,} parameters"

    def _learns(self) -> str:
        options = self.options.distill
        assert options.teacher is not None
        return (
            f"{super()._learns()}, and what {code(short(options.teacher))} finds likely (weight "
            f"{options.weight:g}, temperature {options.temperature:g})"
        )
