"""How well a masked language model guesses, the same way in PyTorch and in onnxruntime.

Windows lie side by side over a split, and what is masked in a window depends on its place alone:
two evaluations of one split ask for the same tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from gptopt.data import IGNORED, Masking
from gptopt.evaluate import ALL, Ints, Share, negative_log_likelihood, windows
from gptopt.log import progress
from gptopt.runtime.edge import EdgeModel

if TYPE_CHECKING:
    from torch import nn

    from gptopt.data import TokenSplit

# ids (B, T), chosen (B, T) bool -> logits (N, V) of the chosen places
Guesser = Callable[[Ints, npt.NDArray[np.bool_]], npt.NDArray[np.float32]]

_LOGITS_AT_ONCE = 2**26  # float32 logits of one batch: 256 MiB
_SEED = 0


class MaskedScore(NamedTuple):
    """Mean loss in nats, share of right guesses, and how many tokens were asked for."""

    loss: float
    accuracy: float
    tokens: int


def score_masked(
    guess: Guesser,
    split: "TokenSplit",
    masking: Masking,
    *,
    vocab_size: int,
    block_size: int,
    batch_size: int,
    max_batches: int = 0,
    max_tokens: int = 0,
    share: Share = ALL,
    show: bool = False,
) -> MaskedScore | None:
    """Score the masked tokens of a split; None where none of them was chosen.

    Args:
        guess: the model.
        split: of a Dataset.
        masking: which tokens are masked, and how.
        vocab_size: V.
        block_size: T, tokens per window.
        batch_size: windows per batch, fewer where their logits would not fit in memory.
        max_batches: score only so many batches, spread evenly over the split; 0: all.
        max_tokens: read so many tokens at most; 0: all.
        share: of the batches that this process scores; the result is that of all.
        show: tell how far it is.
    """
    tokens = min(len(split), max_tokens) if max_tokens else len(split)
    loss, right, count = 0.0, 0, 0
    rows_at_once = max(1, _LOGITS_AT_ONCE // (block_size * vocab_size))
    parts = [
        (offsets[begin : begin + rows_at_once], length)
        # A window of next tokens reads one token more than it predicts from.
        for offsets, length in windows(tokens + 1, block_size, batch_size, max_batches)
        for begin in range(0, len(offsets), rows_at_once)
    ]
    with progress(tokens, "tokens") as shown:
        for (offsets, length), counts in share.of(parts):
            ids, targets = _masked(split, offsets, length, masking)
            chosen = targets != IGNORED
            logits, asked = guess(ids, chosen), targets[chosen]
            if counts:
                loss += negative_log_likelihood(logits, asked)
                right += int((logits.argmax(-1) == asked).sum())
                count += len(asked)
            if show:
                shown.update(len(offsets) * length)
    loss, *counted = share.total([loss, right, count])
    right, count = map(int, counted)
    return MaskedScore(loss / count, right / count, count) if count else None


def _masked(split: "TokenSplit", offsets: Ints, length: int, masking: Masking) -> tuple[Ints, Ints]:
    rows = [
        masking.apply(split.read(start, start + length)[None], _SEED, start)
        for start in offsets.tolist()
    ]
    ids, targets = zip(*rows, strict=True)
    return np.concatenate(ids), np.concatenate(targets)


def torch_guesser(model: "nn.Module") -> Guesser:
    """Guesses with a PyTorch model in evaluation mode, without gradients."""
    import torch

    device = next(model.parameters()).device

    def guess(ids: Ints, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits = model(torch.from_numpy(ids).to(device)).logits  # (B, T, V)
                places = torch.from_numpy(chosen).to(device)
                return logits[places].float().cpu().numpy()  # type: ignore[no-any-return]  # numpy of torch
        finally:
            model.train(training)

    return guess


def edge_guesser(model: EdgeModel) -> Guesser:
    """Guesses with an exported model."""

    def guess(ids: Ints, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        return model.forward(ids)[0][chosen]

    return guess
