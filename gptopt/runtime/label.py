"""What labels a classifier gives to texts; PyTorch models are played alike."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.errors import UserError
from gptopt.log import say
from gptopt.runtime.generation import prompt_ids
from gptopt.scores import given, probabilities
from gptopt.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]
Forward = Callable[[Ints, Ints], npt.NDArray[np.float32]]  # ids, mask (B, T) -> scores (B, L)


def label_texts(
    forward: Forward,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    labels: list[str],
    multi_label: bool,
    block_size: int,
) -> list[dict[str, Any]]:
    """The labels of some texts.

    Returns:
        Of each text: prompt, label (the likeliest; null where it may have several), labels (those
        it is given) and probabilities (label -> probability).

    Raises:
        UserError: a text does not fit.
    """
    rows = [prompt_ids(tokenizer, text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > block_size:
            raise UserError(
                f"--prompt {text[:60]!r}: has {len(row)} tokens, the model sees {block_size}; "
                f"shorten it"
            )
    ids, mask = padded(rows, tokenizer.pad_id)
    chances = probabilities(forward(ids, mask), multi_label=multi_label)
    said = given(chances, multi_label=multi_label)
    return [
        {
            "prompt": text,
            "label": None if multi_label else labels[int(row.argmax())],
            "labels": [name for name, own in zip(labels, flags, strict=True) if own],
            "probabilities": dict(zip(labels, row.tolist(), strict=True)),
        }
        for text, row, flags in zip(texts, chances, said, strict=True)
    ]


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Ints, Ints]:
    """Texts of different lengths as ids and mask (B, T), padded on the right."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), int(lengths.max())), pad_id, dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
    return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)


def show_labels(
    results: list[dict[str, Any]], where: dict[str, str], *, json_output: bool
) -> dict[str, Any]:
    """The verb's JSON object; without --json its results are shown too."""
    if not json_output:
        for result in results:
            shown = result["labels"] or ["(none)"]
            chances = result["probabilities"]
            told = ", ".join(
                f"{name} {chances[name]:.1%}" if name in chances else name for name in shown
            )
            say(told if len(results) == 1 else f"{told}\t{result['prompt']}")
    alone = results[0] if len(results) == 1 else {}
    return {"results": results, **alone, **where}
