"""How well a classifier labels texts, the same way in PyTorch and in onnxruntime."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptopt.config import EvaluateOptions
from gptopt.errors import UserError
from gptopt.finetune.examples import Reader
from gptopt.finetune.labels import LabelEncoder
from gptopt.log import progress, say
from gptopt.runtime.label import Forward, padded
from gptopt.scores import score_labels, table
from gptopt.tokenizer import Tokenizer


def evaluate_labels(
    forward: Forward,
    tokenizer: Tokenizer,
    options: EvaluateOptions,
    *,
    labels: list[str],
    multi_label: bool,
    block_size: int,
) -> dict[str, Any]:
    """Label the texts of --data and compare.

    Returns:
        texts, and what `gptopt.scores.score_labels` returns.

    Raises:
        UserError: a record is malformed, its label unknown or its text too long.
    """
    fields = (options.text_field, options.label_field)
    encode = LabelEncoder(
        tokenizer, labels, text_field=fields[0], label_field=fields[1], several=multi_label
    )
    examples = Reader(fields, encode, block_size, "error").read(options.data)
    found = []
    with progress(len(examples), "texts") as shown:
        for begin in range(0, len(examples), options.batch_size):
            part = range(begin, min(begin + options.batch_size, len(examples)))
            rows: Sequence[list[int]] = [examples.ids[examples.span(at)].tolist() for at in part]
            found.append(forward(*padded(rows, tokenizer.pad_id)))
            shown.update(len(part))
    scores = score_labels(np.concatenate(found), examples.labels, labels, multi_label=multi_label)
    if not np.isfinite(scores["val_loss"]):
        raise UserError(f"{options.model}: the loss is not finite; use an earlier checkpoint")
    return {"texts": len(examples), **scores}


def show_scores(result: dict[str, Any]) -> None:
    """The figures for people."""
    for line in table(result):
        say(line)
    say(
        f"{result['texts']:,} texts: accuracy {result['accuracy']:.1%}, F1 {result['f1']:.3f}, "
        f"loss {result['val_loss']:.4f}"
    )
