"""`gptopt finetune classify`: text to labels, on top of a language model."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gptopt.card import HERE, short
from gptopt.checkpoint import LoadedModel, load_model
from gptopt.config import ModelConfig
from gptopt.config_classifier import ClassifierConfig, Labelling, labels_of
from gptopt.config_finetune import ClassifyOptions
from gptopt.data import ItemSampler
from gptopt.data.records import read_records
from gptopt.errors import UserError
from gptopt.evaluate import Share
from gptopt.finetune.confusion import draw_confusion
from gptopt.finetune.examples import Encode, Examples, Ints
from gptopt.finetune.labels import LabelEncoder, names_of
from gptopt.finetune.objective import FromExamples
from gptopt.lora import base_of, begin, merge_lora
from gptopt.model import GPT, Classifier, as_classifier
from gptopt.runtime.label import padded
from gptopt.scores import score_labels
from gptopt.training.objective import Batch, Figures, Told

logger = logging.getLogger(__name__)

PICTURE = "confusion.png"


class Labels(FromExamples):
    """Each text is asked for its label, or whether it has each of several."""

    FIXED = (*FromExamples.FIXED, "multi_label", "pooling", "class_weights")
    options: ClassifyOptions
    labels: list[str]

    def __init__(self, options: ClassifyOptions) -> None:
        self.options = options

    def fields(self) -> list[str]:
        """Text and label."""
        return [self.options.text_field, self.options.label_field]

    def longest(self) -> int:
        """Every token is read."""
        return self.block_size

    def encoder(self, start: LoadedModel) -> Encode:
        """Text to tokens, names of labels to their numbers."""
        options = self.options
        self.labels = labels_of(start.model.config) or options.labels or self._labels_of_examples()
        if options.labels and options.labels != self.labels:
            raise UserError(
                f"--labels {', '.join(options.labels)}: the model {options.init_from} has"
                f" {', '.join(self.labels)}; leave the option out"
            )
        if len(self.labels) < 2 and not options.multi_label:
            raise UserError(
                f"{options.inputs[0]}: every text has the label {self.labels[0]!r}; give examples"
                f" of another one"
            )
        return LabelEncoder(
            self.tokenizer, self.labels, text_field=options.text_field,
            label_field=options.label_field, several=options.multi_label,
            parse_control=options.parse_control,
        )  # fmt: skip

    def _labels_of_examples(self) -> list[str]:
        found: set[str] = set()
        options = self.options
        for name in options.inputs:
            if not Path(name).is_file():
                raise UserError(f"{name}: no such file; give examples as .jsonl or .parquet")
            for where, record in read_records(Path(name), self.fields(), "--label-field"):
                try:
                    names = names_of(record, options.label_field, several=options.multi_label)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
                found.update(names)
        if not found:
            raise UserError(f"{', '.join(options.inputs)}: no text has a label; nothing to learn")
        return sorted(found)

    def sequences(self) -> int:
        """Texts."""
        return len(self.chosen)

    def model_config(self, start: LoadedModel | None, *, resuming: bool) -> ModelConfig:
        """The shape of the model to start from, with its labels."""
        config = super().model_config(start, resuming=resuming)
        options, pooling = self.options, self.options.pooling
        if pooling == "auto":
            pooling = "last" if config.causal else "mean"
        asked = {"labels": self.labels, "multi_label": options.multi_label, "pooling": pooling}
        if isinstance(config, ClassifierConfig) and not resuming:
            for name, value in asked.items():
                if getattr(config, name) != value:
                    raise UserError(
                        f"--{name.replace('_', '-')} {value}: the model {options.init_from} has"
                        f" {getattr(config, name)}; use the same"
                    )
        return Labelling.model_validate(asked).of(config)

    def build(self, config: ModelConfig, start: LoadedModel | None) -> GPT:
        """The trunk of the model to start from, and its labels' layer where it has one."""
        assert isinstance(config, ClassifierConfig)
        assert start is not None
        if isinstance(start.model, Classifier):
            return super().build(config, start)
        lora, plain = self.options.lora, start.model
        if plain.lora is not None and lora.rank:
            raise UserError(
                f"--lora.rank {lora.rank}: the model to start from has an adapter of its own; merge"
                f" it first, with gptopt merge"
            )
        model = as_classifier(merge_lora(plain), config)
        if lora.rank:
            model.base = base_of(plain, start.folder)
        return begin(model, lora, model, start.folder)

    def batches(
        self, config: ModelConfig, batch_size: int, rank: int, world: int
    ) -> "LabelledBatches":
        """Texts in a shuffled order."""
        order = ItemSampler(len(self.chosen), batch_size, self.options.seed, rank, world)
        return LabelledBatches(self, order)

    def weights(self) -> npt.NDArray[np.float32]:
        """How much a label counts where a text has it, and where not: (2, L), 1 on average."""
        targets = self.examples.labels[self.chosen]
        count, have = len(targets), targets.sum(axis=0)
        if self.options.class_weights == "none":
            return np.ones((2, len(self.labels)), dtype=np.float32)
        if not self.options.multi_label:
            share = count / np.maximum(have, 1) / max(1, int((have > 0).sum()))
            return np.stack((share, share)).astype(np.float32)
        with_it, without = (count / 2 / np.maximum(n, 1) for n in (have, count - have))
        return np.stack((with_it, without)).astype(np.float32)

    def inputs(self, examples: Examples, rows: Ints) -> dict[str, npt.NDArray[Any]]:
        """ids and attention_mask (B, T) of some texts, padded on the right."""
        texts = [examples.ids[examples.span(index)].tolist() for index in rows.tolist()]
        ids, mask = padded(texts, self.tokenizer.pad_id)
        return {"ids": ids, "attention_mask": mask}

    def scores(self, model: GPT) -> dict[str, Any] | None:
        """All figures of the held-out texts."""
        rows, options = self.held_out, self.options
        if options.eval_batches:
            rows = rows[: options.eval_batches * options.batch_size]
        if not len(rows):
            return None
        found = []
        device, training = next(model.parameters()).device, model.training
        model.eval()
        try:
            for begin in range(0, len(rows), options.batch_size):
                part = rows[begin : begin + options.batch_size]
                inputs = {
                    name: torch.from_numpy(value).to(device)
                    for name, value in self.inputs(self.val_examples, part).items()
                }
                with torch.no_grad():
                    logits = model(**inputs).logits
                assert logits is not None
                found.append(logits.float().cpu().numpy())
        finally:
            model.train(training)
        targets = self.val_examples.labels[rows]
        return score_labels(
            np.concatenate(found), targets, self.labels, multi_label=options.multi_label
        )

    def evaluate(self, model: GPT, share: Share) -> Figures | None:
        """Loss, accuracy and F1 on the held-out texts, every rank on all of them."""
        scores = self.scores(model)
        if scores is None:
            return None
        return {
            "val_loss": scores["val_loss"],
            "val_accuracy": scores["accuracy"],
            "val_f1": scores["f1"],
        }

    def finish(self, model: GPT, out: Path) -> dict[str, Any]:
        """The figures of the checkpoint that the run stands for; a picture of its mistakes."""
        best = load_model(out, device=next(model.parameters()).device, kernels=model.kernels).model
        scores = self.scores(best) or {"accuracy": None, "f1": None, "labels": None,
                                       "confusion": None}  # fmt: skip
        drawn = scores["confusion"] is not None and draw_confusion(
            np.array(scores["confusion"]), self.labels, out / PICTURE, f"{out.name}: labels"
        )
        return {
            **super().finish(model, out),
            "labels": self.labels,
            "val_accuracy": scores["accuracy"],
            "val_f1": scores["f1"],
            "val_scores": scores["labels"],
            "confusion": scores["confusion"],
            "confusion_matrix": str(out / PICTURE) if drawn else None,
        }

    def describe(self) -> str:
        """Examples and labels."""
        return f"{super().describe()}, {len(self.labels)} labels"

    def told(self) -> Told:
        """Labels are measured again where what was held out is a file of its own."""
        options, several = self.options, "any of several labels" if self.options.multi_label else ""
        data = short(options.val_data[0]) if len(options.val_data) == 1 else "HELD_OUT.jsonl"
        measure = (
            f"`gptopt evaluate {HERE} --data {data} --text-field {options.text_field} "
            f"--label-field {options.label_field}` measures a file of examples"
            + (", here all that was held out." if options.val_data else
               "; what is held out of one file is a file of its own with `--val-data`.")
        )  # fmt: skip
        return self._told("finetune classify", several or "the label of a text", "text", measure)


class LabelledBatches:
    """Texts with their labels, in the order's order."""

    def __init__(self, objective: Labels, order: ItemSampler) -> None:
        self._objective, self._order = objective, order
        self._weights = objective.weights()

    def next(self) -> Batch:
        """This rank's part of the next texts."""
        objective = self._objective
        whole = objective.chosen[self._order.take()]
        here = self._order.part(whole)
        inputs = objective.inputs(objective.examples, here)
        targets = objective.examples.labels[here]
        having, lacking = self._weights
        weights = np.where(targets > 0.5, having, lacking)  # (B, L)
        if objective.options.multi_label:
            inputs |= {"targets": targets, "weights": weights.astype(np.float32)}
        else:
            own = targets.argmax(axis=1)
            inputs |= {"targets": own, "weights": self._weights[0][own]}
        tokens = int(objective.examples.lengths[whole].sum())
        return Batch(inputs, len(here), len(whole), tokens, whole.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The order's."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The order's."""
        self._order.load_state_dict(state)
