"""`gptopt finetune sft`: replies to prompts and conversations, packed; only replies are learned."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptopt.checkpoint import LoadedModel
from gptopt.config import ModelConfig, SamplingOptions
from gptopt.config_classifier import says_next
from gptopt.config_finetune import SftOptions
from gptopt.data import ItemSampler
from gptopt.data.records import Record, reading
from gptopt.errors import UserError
from gptopt.evaluate import Share
from gptopt.finetune.chat import PLAIN, ChatTemplate, check_roles
from gptopt.finetune.examples import Encode, Example, text_of
from gptopt.finetune.objective import FromExamples
from gptopt.finetune.packing import Packed
from gptopt.generate import generate_tokens
from gptopt.model import GPT
from gptopt.runtime.generation import prompt_ids
from gptopt.tokenizer import Tokenizer
from gptopt.training.objective import Batch, Figures, Told

logger = logging.getLogger(__name__)

_SAMPLING = SamplingOptions(max_new_tokens=64, temperature=0.0)


class Replies(FromExamples):
    """Every token of a reply is asked for; prompts and other people's messages are only read."""

    FIXED = (*FromExamples.FIXED, "z_loss")
    options: SftOptions

    def __init__(self, options: SftOptions) -> None:
        self.options = options

    def fields(self) -> list[str]:
        """Those of both forms of an example."""
        options = self.options
        return [options.messages_field, options.prompt_field, options.completion_field]

    def longest(self) -> int:
        """Its last token is asked for, never read."""
        return self.block_size + 1

    def _check_start(self, start: LoadedModel) -> None:
        if not says_next(start.model.config):
            raise UserError(
                f"{self.options.init_from}: is a masked language model or a classifier, which"
                f" cannot write a reply; start from a next-token model"
            )

    def encoder(self, start: LoadedModel) -> Encode:
        """Prompt and completion, or a conversation; whichever a record has."""
        spell = _Spelling(self.options, self.tokenizer)
        self.tokenizer = spell.tokenizer
        return spell

    def sequences(self) -> int:
        """Blocks of packed examples."""
        return len(self.packed)

    def model_config(self, start: LoadedModel | None, *, resuming: bool) -> ModelConfig:
        """The shape of the model to start from."""
        pad = self.tokenizer.pad_id
        self.packed = Packed(self.examples, self.chosen, self.block_size, pad)
        self.val_packed = Packed(self.val_examples, self.held_out, self.block_size, pad)
        return super().model_config(start, resuming=resuming)

    def batches(
        self, config: ModelConfig, batch_size: int, rank: int, world: int
    ) -> "PackedBatches":
        """Packed blocks in a shuffled order."""
        seed = self.options.seed
        order = ItemSampler(len(self.packed), batch_size, seed, rank, world)
        return PackedBatches(self.packed, order)

    def keywords(self) -> dict[str, float]:
        """The loss may be smoothed, and its logits kept small."""
        return {**super().keywords(), "z_loss": self.options.z_loss}

    def evaluate(self, model: GPT, share: Share) -> Figures | None:
        """The mean loss of the held-out replies' tokens."""
        packed, options = self.val_packed, self.options
        count = len(packed)
        if options.eval_batches:
            count = min(count, options.eval_batches * options.batch_size)
        loss_sum, asked = 0.0, 0
        batches = [
            np.arange(begin, min(begin + options.batch_size, count))
            for begin in range(0, count, options.batch_size)
        ]
        device, training = next(model.parameters()).device, model.training
        model.eval()
        try:
            for blocks, counts in share.of(batches):
                inputs = {
                    name: torch.from_numpy(value).to(device)
                    for name, value in packed.batch(blocks).items()
                }
                counted = int(packed.counts[blocks].sum()) if counts else 0
                with torch.no_grad():
                    loss = model(**inputs).loss
                assert loss is not None
                loss_sum, asked = loss_sum + float(loss) * counted, asked + counted
        finally:
            model.train(training)
        loss_sum, all_asked = share.total([loss_sum, asked])
        return {"val_loss": loss_sum / all_asked} if all_asked else None

    def sample(self, model: GPT) -> str | None:
        """The beginning of a held-out example up to its first reply, and the model's own reply."""
        examples = self.val_examples if len(self.held_out) else self.examples
        index = int((self.held_out if len(self.held_out) else self.chosen)[0])
        span = examples.span(index)
        learned = examples.learned[span]
        asked = examples.ids[span][: int(learned.argmax())].tolist()
        done = generate_tokens(
            model, [asked], _SAMPLING, tokenizer=self.tokenizer, context="slide",
            end_ids=[self.tokenizer.eos_id],
        )  # fmt: skip
        return self.tokenizer.decode(asked, skip_special=False) + done.rows[0].text

    def finish(self, model: GPT, out: Path) -> dict[str, Any]:
        """How many examples there were, and into how many blocks they went."""
        return {**super().finish(model, out), "blocks": len(self.packed)}

    def describe(self) -> str:
        """Examples, and how full the blocks are."""
        full = int(self.packed.tokens.sum()) / (len(self.packed) * self.block_size)
        return f"{super().describe()}, packed into {len(self.packed):,} blocks, {full:.0%} full"

    def told(self) -> Told:
        """Replies are what is learned and measured."""
        measure = "Training alone measures replies: the run folder's metrics.jsonl has them all."
        learns = "replies; prompts are only read"
        told = self._told("finetune sft", learns, "token of a reply", measure)
        return told._replace(predicts_next=True)


class PackedBatches:
    """Packed blocks in the order's order."""

    def __init__(self, packed: Packed, order: ItemSampler) -> None:
        self._packed, self._order = packed, order

    def next(self) -> Batch:
        """This rank's part of the next blocks."""
        whole = self._order.take()
        here = self._order.part(whole)
        counts, tokens = self._packed.counts, self._packed.tokens
        return Batch(
            self._packed.batch(here),
            counted=int(counts[here].sum()),
            total=int(counts[whole].sum()),
            tokens=int(tokens[whole].sum()),
            where=whole.tolist(),
        )

    def state_dict(self) -> dict[str, Any]:
        """The order's."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The order's."""
        self._order.load_state_dict(state)


class _Spelling:
    """Makes tokens of records, and knows the template of conversations when the first one comes."""

    def __init__(self, options: SftOptions, tokenizer: Tokenizer) -> None:
        self._options = options
        source, where = tokenizer.chat_template, "the model's chat template"
        if options.chat_template is not None:
            where = options.chat_template
            source = _read_template(Path(where))
        # The model that comes out is spoken to as it was taught.
        self.tokenizer = tokenizer.with_chat_template(source or PLAIN)
        self._template = ChatTemplate(
            source or PLAIN, tokenizer, parse_control=options.parse_control, where=where
        )

    def __call__(self, record: Record) -> Example:
        options = self._options
        if record.get(options.messages_field) is not None:
            if record.get(options.prompt_field) is not None:
                raise UserError(
                    f"both {options.messages_field!r} and {options.prompt_field!r} are there;"
                    f" give one of them"
                )
            try:
                messages = check_roles(record[options.messages_field])
            except UserError as error:
                raise UserError(f"field {options.messages_field!r}: {error}") from None
            return _example(self._template.parts(messages))
        return self._completion(record)

    def _completion(self, record: Record) -> Example:
        options = self._options
        if options.prompt_field not in record and options.completion_field not in record:
            found = ", ".join(sorted(record)[:10]) or "none"
            raise UserError(
                f"neither {options.messages_field!r} nor {options.prompt_field!r} with"
                f" {options.completion_field!r} (found: {found}); name the fields with"
                f" --messages-field, or --prompt-field and --completion-field"
            )
        prompt = text_of(record, options.prompt_field, "--prompt-field")
        completion = text_of(record, options.completion_field, "--completion-field")
        if not completion.strip():
            raise UserError(
                f"field {options.completion_field!r} is empty, so there is nothing to learn;"
                f" remove the line"
            )
        if options.parse_control:
            asked = self.tokenizer.encode_with_control(prompt) or [self.tokenizer.bos_id]
            reply = self.tokenizer.encode_with_control(completion)
        else:
            asked = prompt_ids(self.tokenizer, prompt)
            reply = self.tokenizer.encode(completion)
        return _example([(asked, False), ([*reply, self.tokenizer.eos_id], True)])


def _example(parts: list[tuple[list[int], bool]]) -> Example:
    ids = [id_ for part, _ in parts for id_ in part]
    learned = [reply for part, reply in parts for _ in part]
    return Example(ids, learned, [])


def _read_template(path: Path) -> str:
    with reading(path):
        content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it") from None
