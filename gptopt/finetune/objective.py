"""What objectives that learn from examples share: a model to start from, files, epochs."""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

from gptopt.card import code, short
from gptopt.checkpoint import LoadedModel
from gptopt.config import ModelConfig
from gptopt.config_finetune import FinetuneOptions
from gptopt.errors import UserError
from gptopt.finetune.examples import Encode, Examples, Ints, Reader, hold_out
from gptopt.model import GPT
from gptopt.training.objective import Objective, Told


class FromExamples(Objective):
    """Examples in, a fine-tuned model out.

    Attributes:
        examples, chosen: those that are learned from, and which of them.
        val_examples, held_out: those that validate, and which of them.
    """

    FIXED = (*Objective.FIXED, "epochs", "block_size", "overlong", "parse_control", "dropout")
    options: FinetuneOptions
    examples: Examples
    val_examples: Examples
    chosen: Ints
    held_out: Ints

    @abstractmethod
    def fields(self) -> list[str]:
        """Columns of a parquet file that may be needed."""

    @abstractmethod
    def encoder(self, start: LoadedModel) -> Encode:
        """How a record becomes an example."""

    @abstractmethod
    def longest(self) -> int:
        """Tokens of an example at most, where `block_size` are read."""

    @abstractmethod
    def sequences(self) -> int:
        """How many sequences an epoch has."""

    def open(self, out: Path, start: LoadedModel | None, *, resuming: bool) -> None:
        """Read and encode all examples."""
        assert start is not None
        options = self.options
        if start.tokenizer is None:
            raise UserError(
                f"{start.folder}: has no tokenizer.json, so it reads no text; copy the tokenizer it"
                f" was trained with there"
            )
        self.tokenizer = start.tokenizer
        most = start.model.config.block_size
        self.block_size = options.block_size or most
        if self.block_size > most:
            raise UserError(
                f"--block-size {self.block_size}: {options.init_from} sees {most} tokens; give at"
                f" most that"
            )
        self._check_start(start)
        reader = Reader(self.fields(), self.encoder(start), self.longest(), options.overlong)
        self.examples = reader.read(options.inputs)
        if options.val_data:
            self.chosen, _ = hold_out(len(self.examples), 0)
            self.val_examples = reader.read(options.val_data)
            self.held_out, _ = hold_out(len(self.val_examples), 0)
        else:
            self.val_examples = self.examples
            self.chosen, self.held_out = hold_out(len(self.examples), options.val_fraction)
        self.sha256 = self.examples.sha256()

    def _check_start(self, start: LoadedModel) -> None:
        """Refuse a model that cannot learn this."""

    def model_config(self, start: LoadedModel | None, *, resuming: bool) -> ModelConfig:
        """The shape of the model to start from; dropout may be another."""
        assert start is not None
        dropout = self.options.dropout
        changes = {} if dropout is None else {"dropout": dropout}
        return start.model.config.model_copy(update=changes)

    def steps(self, sequences: int) -> int:
        """What --steps says, or what the epochs take."""
        wanted = self.options.epochs * self.sequences()
        return self.options.steps or math.ceil(wanted / sequences)

    def finish(self, model: GPT, out: Path) -> dict[str, Any]:
        """How many examples there were."""
        return {
            "examples": len(self.chosen),
            "val_examples": len(self.held_out),
            "dropped": self.examples.dropped,
            "epochs": self.options.epochs,
        }

    def describe(self) -> str:
        """How many examples there are."""
        return f"{len(self.chosen):,} examples to learn and {len(self.held_out):,} to validate"

    def _told(self, verb: str, learns: str, loss_of: str, measure: str) -> Told:
        """Names and numbers of the examples, for the card."""
        options = self.options
        learned, held = (
            ", ".join(code(short(name)) for name in files)
            for files in (options.inputs, options.val_data)
        )
        part, scored = f"{len(self.held_out):,} held-out examples", options.eval_batches
        if scored:
            part = f"the first {scored * options.batch_size:,} sequences of {part}"
        return Told(
            verb=verb,
            learns=learns,
            data={
                "examples": f"{learned}; held out: {held}" if held else learned,
                "how many": f"{len(self.chosen):,} to learn from, {len(self.held_out):,} held out,"
                f" {self.examples.dropped:,} left out as too long, sha256 `{self.sha256}`",
            },
            held_out=part,
            loss_of=loss_of,
            measure=measure,
        )
