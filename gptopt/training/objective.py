"""What a run learns: an objective brings data, batches, the model's shape and the judgement.

The loop knows nothing of tokens, replies or labels; it asks the objective.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy.typing as npt
from torch import Tensor

from gptopt.checkpoint import LoadedModel
from gptopt.config import LoopOptions, ModelConfig
from gptopt.evaluate import Share
from gptopt.lora import begin
from gptopt.model import GPT, model_of
from gptopt.tokenizer import Tokenizer

Figures = dict[str, float]


class Batch(NamedTuple):
    """One micro-batch on its way into the model."""

    inputs: dict[str, npt.NDArray[Any]]  # keywords of this rank's forward pass, with targets
    counted: int  # targets among them that the mean of the loss is over
    total: int  # such targets of all ranks together
    tokens: int  # real tokens that all ranks read
    where: list[int]  # which sequences all ranks read, for a look at them later


class Batches(Protocol):
    """An endless row of micro-batches with a position that can be saved as JSON."""

    def next(self) -> Batch:
        """The next one."""

    def state_dict(self) -> dict[str, Any]:
        """The position, ready for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch of the one that gave this state."""


class Told(NamedTuple):
    """What a model card says of an objective and its data, in Markdown."""

    verb: str  # as it is typed
    learns: str
    data: dict[str, str]  # what it is -> how much of it, the name first
    held_out: str  # what the validation figures are means over
    loss_of: str  # such as "token": the loss is a mean over them
    measure: str  # how to measure again
    predicts_next: bool = False  # so a loss is a perplexity
    bytes_per_token: float | None = None  # of the held-out text

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Of a loss in nats per token; None where it, or the text behind it, is not known."""
        if loss is None or self.bytes_per_token is None:
            return None
        return loss / math.log(2) / self.bytes_per_token


class Objective(ABC):
    """What a run learns. Methods are called in the order in which they stand here.

    Attributes:
        options: the verb's.
        tokenizer: set by `open`, as is sha256, the identity of the data.
        block_size: tokens of a sequence at most; set by `model_config`.
        teacher: another model that its loss calls, if it does.
    """

    # Options that a resumed run may not change. How long it goes on, what it shows and where it
    # runs may (another device or another kernel body no longer repeats every bit).
    FIXED: ClassVar[tuple[str, ...]] = (
        "seed", "batch_size", "accumulate", "lr", "min_lr", "warmup_steps", "schedule",
        "optimiser", "weight_decay", "beta1", "beta2", "momentum", "grad_clip", "label_smoothing",
        "init_from", "qat",
    )  # fmt: skip

    options: LoopOptions
    tokenizer: Tokenizer
    sha256: str
    block_size: int
    teacher: GPT | None = None

    def explicit_shape(self) -> dict[str, Any]:
        """Fields of the model that the user named, to compare with a checkpoint's early."""
        return {}

    @abstractmethod
    def open(self, out: Path, start: LoadedModel | None, *, resuming: bool) -> None:
        """Read the data; `start` is the model that the run begins or continues with."""

    @abstractmethod
    def model_config(self, start: LoadedModel | None, *, resuming: bool) -> ModelConfig:
        """The model's shape, its vocabulary included."""

    @abstractmethod
    def batches(self, config: ModelConfig, batch_size: int, rank: int, world: int) -> Batches:
        """The training batches from their beginning, this rank's part of each.

        Args:
            config: the model's.
            batch_size: sequences of one micro-batch of all ranks together.
            rank, world: which part of it is this rank's.
        """

    def steps(self, sequences: int) -> int:
        """How many steps the run takes, where each reads so many sequences."""
        return self.options.steps

    def build(self, config: ModelConfig, start: LoadedModel | None) -> GPT:
        """The model with its first weights, on the CPU, in float32."""
        fresh = model_of(config, kernels=self.options.kernels)
        if start is None:
            return begin(fresh, self.options.lora)
        return begin(fresh, self.options.lora, start.model, start.folder)

    def keywords(self) -> dict[str, float]:
        """What every forward pass in training gets beside a batch."""
        return {"label_smoothing": self.options.label_smoothing}

    def loss(
        self, forward: Callable[..., Any], inputs: Mapping[str, Tensor], **keywords: Any
    ) -> Tensor:
        """The loss () of one micro-batch, a mean over what `Batch.counted` counts.

        Args:
            forward: the model.
            inputs: of the batch, on the model's device.
            keywords: of `keywords`, and the seed of dropout.
        """
        loss: Tensor = forward(**inputs, **keywords).loss
        return loss

    @abstractmethod
    def evaluate(self, model: GPT, share: Share) -> Figures | None:
        """Figures of the held-out part, `val_loss` (nats) among them; None where there is none.

        All ranks call it, and the model equally often.

        Args:
            model: trained so far.
            share: which part of the batches this rank may leave it at; the figures are of all.
        """

    def sample(self, model: GPT) -> str | None:
        """Some text that shows what the model has learned; None where there is none to show."""
        return None

    def finish(self, model: GPT, out: Path) -> dict[str, Any]:
        """Files beside the run's own, and what its result says of them."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """The data in half a line."""

    @abstractmethod
    def told(self) -> Told:
        """The same for the card of the model, with what is needed to believe its figures."""
