"""`gptopt train`: the objectives that need nothing but text, next token and masked token."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from gptopt.card import HERE, code, short
from gptopt.checkpoint import LoadedModel
from gptopt.config import ModelConfig, SamplingOptions, TrainOptions
from gptopt.config_classifier import labels_of
from gptopt.data import IGNORED, Dataset, Masking, Mixture, TokenSplit, open_dataset
from gptopt.data.sampler import SequenceSampler
from gptopt.errors import UserError
from gptopt.evaluate import Share, evaluate_split
from gptopt.evaluate_masked import score_masked, torch_guesser
from gptopt.generate import generate_text
from gptopt.model import GPT
from gptopt.tokenizer import Tokenizer
from gptopt.training.objective import Batch, Figures, Objective, Told

VOCABULARY_MULTIPLE = 64  # matrix products like it; the ids in excess are never used
_PROMPT_TOKENS = 8
_DECODED_TOKENS = 2**20  # which takes a second
_SAMPLING = SamplingOptions(max_new_tokens=100, temperature=0.8, seed=0)


class NextToken(Objective):
    """Every token of a block but the last is asked for the next one."""

    FIXED = (*Objective.FIXED, "objective", "z_loss")
    options: TrainOptions
    dataset: Dataset | Mixture

    def __init__(self, options: TrainOptions) -> None:
        self.options = options

    def explicit_shape(self) -> dict[str, Any]:
        """What --model, a preset or a file said."""
        model = self.options.model
        return {name: getattr(model, name) for name in model.model_fields_set}

    def open(self, out: Path, start: LoadedModel | None, *, resuming: bool) -> None:
        """The data folder, or the text, tokenised into the run folder."""
        options, cache = self.options, out / "data"
        tokenizer = self.own_tokenizer(start)
        opened = partial(
            open_dataset, options.inputs, options.data,
            tokenizer=tokenizer, cache=cache, mix=options.mix,
        )  # fmt: skip
        try:
            dataset = opened()
        except UserError:
            if resuming or not cache.exists():
                raise
            # What an earlier attempt tokenised from other text or options: no checkpoint needs it.
            shutil.rmtree(cache)
            dataset = opened()
        self.dataset, self.tokenizer, self.sha256 = dataset, dataset.tokenizer, dataset.sha256

    def own_tokenizer(self, start: LoadedModel | None) -> Tokenizer | None:
        """The one that text must be read with, if any."""
        return start.tokenizer if start and self.options.init_from else None

    def model_config(self, start: LoadedModel | None, *, resuming: bool) -> ModelConfig:
        """The shape that was asked for, or the one of the model to start from."""
        options, config, size = self.options, self._asked(), self.tokenizer.size
        if options.init_from is not None and start is not None:
            if labels_of(start.model.config) is not None:
                raise UserError(
                    f"--init-from {options.init_from}: is a classifier, which has no head for"
                    f" tokens; start from the model it was made from"
                )
            config = self._taken_over(start.model.config, resuming=resuming)
        if config.vocab_size is None:
            padded = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            config = config.model_copy(update={"vocab_size": padded})
        assert config.vocab_size is not None
        if config.vocab_size < size:
            raise UserError(
                f"--model.vocab-size {config.vocab_size}: the tokenizer has {size} ids; give"
                f" at least that, or leave the option out"
            )
        self._refuse_attention(config)
        if not resuming:
            self._refuse_other_tokenizer(start)
        tokens, needed = len(self.dataset.train), config.block_size + 1
        if tokens < needed:
            raise UserError(
                f"{', '.join(options.inputs)}: {tokens} training tokens are fewer than the {needed}"
                f" of one block; give more text, or a smaller --model.block-size"
            )
        self.block_size = config.block_size
        return config

    def batches(self, config: ModelConfig, batch_size: int, rank: int, world: int) -> "Blocks":
        """Blocks of text in a shuffled order."""
        sampler = self.dataset.sampler(self.block_size, batch_size, self.options.seed, rank, world)
        return Blocks(self.dataset.train, sampler, self.block_size)

    def keywords(self) -> dict[str, float]:
        """The loss may be smoothed, and its logits kept small."""
        return {**super().keywords(), "z_loss": self.options.z_loss}

    def evaluate(self, model: GPT, share: Share) -> Figures | None:
        """The loss on the validation split, or on an even sample of it."""
        split, options = self.dataset.val, self.options
        if len(split) < 2:
            return None
        loss, _ = evaluate_split(
            model,
            split,
            block_size=self.block_size,
            batch_size=options.batch_size,
            max_batches=options.eval_batches,
            share=share,
        )
        return {"val_loss": loss}

    def sample(self, model: GPT) -> str | None:
        """The beginning of the validation text and how the model goes on."""
        prompt = self._beginning(_PROMPT_TOKENS)
        return prompt + generate_text(model, self.tokenizer, prompt, _SAMPLING)

    def describe(self) -> str:
        """How many tokens there are."""
        return (
            f"{len(self.dataset.train):,} training and {len(self.dataset.val):,} validation tokens"
        )

    def told(self) -> Told:
        """Names and sizes of the texts; gptopt evaluate measures their held-out part again."""
        options, split = self.options, self.dataset.val
        scored, blocks = options.eval_batches * options.batch_size, len(split) // self.block_size
        part = f"all {len(split):,} held-out tokens"
        if 0 < scored < blocks:
            part = f"{scored:,} blocks spread evenly over the {len(split):,} held-out tokens"
        names = ", ".join(code(short(name)) for name in options.inputs)
        if isinstance(self.dataset, Mixture):
            names += f", mixed {', '.join(f'{weight:.4g}' for weight in self.dataset.weights)}"
        return Told(
            verb="train",
            learns=self._learns(),
            data={
                "text": names,
                "how much": f"{len(self.dataset.train):,} tokens to learn from, {len(split):,} held"
                f" out, sha256 `{self.sha256}`",
            },
            held_out=part,
            loss_of=self._ASKED,
            measure=f"`gptopt evaluate {HERE} --data DATA --split val` measures all of the held-out"
            f" text, DATA being the data folder (the run folder's `data`, where text was given).",
            predicts_next=self._ASKED == "token",
            bytes_per_token=self._bytes_per_token(),
        )

    _ASKED = "token"

    def _learns(self) -> str:
        return "the next token of text"

    def _bytes_per_token(self) -> float | None:
        """Of the held-out text, or of its beginning where that is long."""
        split = self.dataset.val
        tokens = min(len(split), _DECODED_TOKENS) - 1  # the first one is never asked for
        if tokens < 1:
            return None
        text = self.tokenizer.decode(split.read(1, tokens + 1).tolist())
        return len(text.encode("utf-8", "replace")) / tokens or None

    def _beginning(self, tokens: int) -> str:
        text = self.dataset.val if len(self.dataset.val) else self.dataset.train
        return self.tokenizer.decode(text.read(0, min(tokens, len(text))).tolist())

    def _asked(self) -> ModelConfig:
        return self.options.model

    def _refuse_attention(self, config: ModelConfig) -> None:
        if not config.causal:
            raise UserError(
                "model.causal=false: next-token training needs a causal model; train one that sees"
                " both sides with --objective masked"
            )

    def _taken_over(self, config: ModelConfig, *, resuming: bool) -> ModelConfig:
        """The loaded model's shape; a flag may repeat it, and may choose another dropout."""
        explicit = self.explicit_shape()
        for name, value in explicit.items():
            found = getattr(config, name)
            if name != "dropout" and value != found and not resuming:
                raise UserError(
                    f"--model.{name.replace('_', '-')} {value}: the model {self.options.init_from}"
                    f" has {found}; leave the option out, or train without --init-from"
                )
        # A resumed run compares the explicit values with its own later, and names the difference.
        return config.model_copy(update=explicit)

    def _refuse_other_tokenizer(self, start: LoadedModel | None) -> None:
        if start is None or start.tokenizer is None:
            return
        if start.tokenizer.sha256 != self.tokenizer.sha256:
            options = self.options
            raise UserError(
                f"--init-from {options.init_from}: its tokenizer is not the one of"
                f" {options.inputs[0]}; tokenise the text with gptopt tokenize --tokenizer"
                f" {options.init_from}"
            )


class Masked(NextToken):
    """Some tokens of a block are hidden or replaced, and asked for from both sides."""

    FIXED = (*NextToken.FIXED, "mask_rate")

    def __init__(self, options: TrainOptions) -> None:
        # Text that is tokenised on the way gets a vocabulary with a mask token.
        data = options.data.model_copy(update={"mask_token": True})
        super().__init__(options.model_copy(update={"data": data}))

    def open(self, out: Path, start: LoadedModel | None, *, resuming: bool) -> None:
        """As for the next token; the tokenizer needs a mask token besides."""
        super().open(out, start, resuming=resuming)
        if self.tokenizer.mask_id is None:
            raise UserError(
                f"{self.options.inputs[0]}: its tokenizer has no mask token; tokenise the text"
                f" again with gptopt tokenize --mask-token"
            )
        self.masking = Masking.of(self.tokenizer, self.options.mask_rate)

    def batches(self, config: ModelConfig, batch_size: int, rank: int, world: int) -> "Blocks":
        """Blocks of text in a shuffled order, masked anew in every epoch."""
        plain = super().batches(config, batch_size, rank, world)
        return MaskedBlocks(plain, self.masking, self.options.seed)

    def evaluate(self, model: GPT, share: Share) -> Figures | None:
        """Loss and accuracy on masked tokens of the validation split, the same ones each time."""
        split, options = self.dataset.val, self.options
        assert model.config.vocab_size is not None
        scored = score_masked(
            torch_guesser(model),
            split,
            self.masking,
            vocab_size=model.config.vocab_size,
            block_size=self.block_size,
            batch_size=options.batch_size,
            max_batches=options.eval_batches,
            share=share,
        )
        return (
            None if scored is None else {"val_loss": scored.loss, "val_accuracy": scored.accuracy}
        )

    def sample(self, model: GPT) -> str | None:
        """A masked language model continues no text."""
        return None

    _ASKED = "masked token"

    def _learns(self) -> str:
        return f"masked tokens of text ({self.options.mask_rate:.0%} of all), from both sides"

    def _bytes_per_token(self) -> float | None:
        return None

    def _asked(self) -> ModelConfig:
        model = self.options.model
        if "causal" in model.model_fields_set:
            return model
        return model.model_copy(update={"causal": False})

    def _refuse_attention(self, config: ModelConfig) -> None:
        if config.causal:
            raise UserError(
                "--objective masked: needs a model that sees both sides, this one is causal; leave"
                " --model.causal out, and start from a masked language model if from any"
            )


class Blocks:
    """Blocks of text in the sampler's order: rows of T tokens, and the tokens after them."""

    def __init__(self, split: TokenSplit, sampler: SequenceSampler, length: int) -> None:
        self.split, self.sampler, self.length = split, sampler, length

    def next(self) -> Batch:
        """This rank's part of the next blocks."""
        whole = self.sampler.take()
        block = self.split.batch(self.sampler.part(whole), self.length)  # (B, T + 1)
        inputs = {"ids": block[:, :-1], "targets": block[:, 1:]}
        tokens = len(whole) * self.length
        return Batch(inputs, inputs["ids"].size, tokens, tokens, whole.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The sampler's."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The sampler's."""
        self.sampler.load_state_dict(state)


class MaskedBlocks(Blocks):
    """Blocks of text with tokens masked: a pure function of seed, place and epoch."""

    def __init__(self, plain: Blocks, masking: Masking, seed: int) -> None:
        super().__init__(plain.split, plain.sampler, plain.length)
        self._masking, self._seed = masking, seed

    def next(self) -> Batch:
        """This rank's part of the next blocks; all of them are masked, to count what is asked."""
        whole = self.sampler.take()
        block = self.split.batch(whole, self.length)[:, :-1]  # (B, T) of all ranks
        entropy = (self._seed, self.sampler.epoch, self.sampler.position)
        ids, targets = self._masking.apply(block, *entropy)
        ids_here, targets_here = self.sampler.part(ids), self.sampler.part(targets)
        return Batch(
            {"ids": ids_here, "targets": targets_here},
            counted=int((targets_here != IGNORED).sum()),
            total=int((targets != IGNORED).sum()),
            tokens=block.size,
            where=whole.tolist(),
        )
