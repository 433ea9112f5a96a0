"""`gptopt evaluate`: mean loss over a whole split, the same way in PyTorch and in onnxruntime.

Targets are counted exactly once: window w reads tokens wT .. wT+T-1 and predicts wT+1 .. wT+T, the
last window is shorter. Every prediction is scored over the model's whole vocabulary. Torch is
imported only for a PyTorch model, so an exported folder is evaluated without it.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from gptopt.choices import evaluate_choices
from gptopt.config import DataOptions, EvaluateOptions
from gptopt.config_classifier import labels_of
from gptopt.data import Masking, open_dataset
from gptopt.errors import CheckFailed, UserError
from gptopt.log import progress, say
from gptopt.runtime.edge import EdgeModel
from gptopt.runtime.folder import is_edge_folder
from gptopt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import nn

    from gptopt.data import Dataset, Mixture, TokenSplit
    from gptopt.evaluate_masked import Guesser
    from gptopt.runtime.label import Forward as LabelForward

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
T = TypeVar("T")
# inputs (B, T), targets (B, T) -> sum over the targets of -ln p, in nats
Scorer = Callable[[Ints, Ints], float]

_LOGITS_AT_ONCE = 2**26  # float32 logits of one batch in onnxruntime: 256 MiB
_POSITIONS_AT_ONCE = 64  # whose log-softmax is computed in float64 at once
_DECODED_TOKENS = 2**22  # bits per byte decode the split, which takes a second per million tokens


class Share(NamedTuple):
    """What one of several processes scores; by default there is one.

    Attributes:
        rank, size: which of how many.
        total: the sums of some numbers over all of them, in float64.
    """

    rank: int = 0
    size: int = 1
    total: Callable[[list[float]], list[float]] = lambda values: values

    def of(self, batches: list[T]) -> Iterator[tuple[T, bool]]:
        """Every size-th batch, and whether it counts.

        All processes get as many: a model that they hold in parts runs on all of them at once.
        """
        rounds = -(-len(batches) // self.size)
        for index in range(self.rank, rounds * self.size, self.size):
            yield batches[min(index, len(batches) - 1)], index < len(batches)


ALL = Share()


def evaluate_split(
    model: "nn.Module",
    split: "TokenSplit",
    *,
    block_size: int,
    batch_size: int,
    max_batches: int = 0,
    share: Share = ALL,
) -> tuple[float, int]:
    """Mean loss per token in nats, and how many tokens were predicted.

    The model is put in evaluation mode and back; autocast is the caller's. It may be wrapped or
    compiled: it is only called, as model(ids, targets).loss.

    Args:
        model: a causal GPT.
        split: of a Dataset.
        block_size: T, tokens per window.
        batch_size: windows per batch.
        max_batches: score only so many batches of windows, spread evenly over the split; 0: all.
        share: of them that this process scores; the result is that of all.

    Raises:
        UserError: the split holds fewer than two tokens.
    """
    batches = list(windows(_tokens_of(split), block_size, batch_size, max_batches))
    return _mean_loss(torch_scorer(model), split, batches, share)


def torch_scorer(model: "nn.Module") -> Scorer:
    """Scores batches with a PyTorch model in evaluation mode, without gradients."""
    import torch

    device = next(model.parameters()).device

    def score(inputs: Ints, targets: Ints) -> float:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                ids, labels = (torch.from_numpy(part).to(device) for part in (inputs, targets))
                return float(model(ids, labels).loss) * targets.size
        finally:
            model.train(training)

    return score


def edge_scorer(model: EdgeModel) -> Scorer:
    """Scores batches with an exported model, few enough windows at a time to fit in memory."""

    def score(inputs: Ints, targets: Ints) -> float:
        T, V = inputs.shape[1], model.config["vocab_size"]
        step = max(1, _LOGITS_AT_ONCE // (T * V))
        total = 0.0
        for begin in range(0, len(inputs), step):
            logits, _ = model.forward(inputs[begin : begin + step])
            flat = logits.reshape(-1, V)
            total += negative_log_likelihood(flat, targets[begin : begin + step].ravel())
        return total

    return score


def negative_log_likelihood(logits: npt.NDArray[np.float32], targets: Ints) -> float:
    """Sum over N of -ln softmax(logits (N, V))[targets (N,)], in float64."""
    total = 0.0
    for begin in range(0, len(targets), _POSITIONS_AT_ONCE):
        rows = logits[begin : begin + _POSITIONS_AT_ONCE].astype(np.float64)
        labels = targets[begin : begin + _POSITIONS_AT_ONCE]
        rows -= rows.max(axis=-1, keepdims=True)
        chosen = rows[np.arange(len(rows)), labels]
        total += float((np.log(np.exp(rows).sum(axis=-1)) - chosen).sum())
    return total


def windows(
    tokens: int, block_size: int, batch_size: int, max_batches: int = 0
) -> Iterator[tuple[Ints, int]]:
    """(offsets (B,), T) of batches that together predict tokens 1 .. tokens - 1 once each."""
    whole, rest = divmod(tokens - 1, block_size)
    picked = np.arange(whole, dtype=np.int64)
    if 0 < max_batches * batch_size < whole:
        # Deterministic and from everywhere, so that losses along a run can be compared.
        count = max_batches * batch_size
        picked, rest = np.arange(count, dtype=np.int64) * whole // count, 0
    for begin in range(0, len(picked), batch_size):
        yield picked[begin : begin + batch_size] * block_size, block_size
    if rest:
        yield np.array([whole * block_size], dtype=np.int64), rest


def _mean_loss(
    score: Scorer,
    split: "TokenSplit",
    batches: list[tuple[Ints, int]],
    share: Share = ALL,
    *,
    show: bool = False,
) -> tuple[float, int]:
    total, tokens = 0.0, 0
    expected = sum(len(offsets) * length for offsets, length in batches)
    with progress(expected, "tokens") as shown:
        for (offsets, length), counts in share.of(batches):
            batch = split.batch(offsets, length)  # (B, T + 1)
            inputs, targets = (np.ascontiguousarray(part) for part in (batch[:, :-1], batch[:, 1:]))
            loss = score(inputs, targets)
            if counts:
                total, tokens = total + loss, tokens + targets.size
            if show:
                shown.update(targets.size, loss=total / tokens)
    total, counted = share.total([total, tokens])
    return total / counted, int(counted)


def _tokens_of(split: "TokenSplit", max_tokens: int = 0) -> int:
    if len(split) < 2:
        raise UserError(
            f"the {split.name} split holds {len(split)} tokens, at least 2 are needed; give more "
            f"text, or choose another split"
        )
    return min(len(split), max_tokens + 1) if max_tokens else len(split)


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Loss and perplexity of a model or an exported folder; or gptopt.choices' accuracy.

    Returns:
        val_loss (nats per token), perplexity (null above e^700), tokens (predicted),
        bits_per_byte (of the text they spell; null for more than 4 million tokens), accuracy
        (null), split (train or val), seconds, tokens_per_second (read), and device or provider.
        Of a masked language model: val_loss and accuracy of the tokens that were masked, tokens
        (how many they were), bits_per_byte null.
        Of a classifier: what gptopt.evaluate_labels.evaluate_labels returns.

    Raises:
        UserError: the model or the data cannot be used, or do not belong together.
        CheckFailed: the loss is not finite, or an exported folder was changed.
    """
    if options.choices is not None:
        return evaluate_choices(options)
    opened = _open_model(options)
    if opened.labels is not None:
        return _score_labels(opened, opened.labels, options)
    data = DataOptions(val_fraction=0.0, text_field=options.text_field)
    dataset = open_dataset(options.data, data, tokenizer=opened.tokenizer)
    split = _choose(dataset, options.split)
    total = _tokens_of(split, options.max_tokens)
    started = time.perf_counter()
    scored = _score(opened, split, options, total)
    seconds = time.perf_counter() - started
    loss = scored["val_loss"]
    if not math.isfinite(loss):
        raise CheckFailed(
            f"{options.model}: the loss is {loss}, so its weights are broken; use an earlier "
            f"checkpoint"
        )
    result = {
        "perplexity": math.exp(loss) if loss < 700 else None,
        **scored,
        "split": split.name,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(total / seconds, 1),
        **opened.where,
    }
    if not options.json_output:
        _show(result)
    return result


def _score(
    opened: "_Opened", split: "TokenSplit", options: EvaluateOptions, total: int
) -> dict[str, Any]:
    """Loss and what goes with it: of next tokens, or of masked ones."""
    if opened.causal:
        batches = list(windows(total, opened.block_size, options.batch_size))
        loss, tokens = _mean_loss(opened.scorer(), split, batches, show=True)
        bits = _bits_per_byte(loss, tokens, split, opened.tokenizer)
        return {"val_loss": loss, "tokens": tokens, "bits_per_byte": bits, "accuracy": None}
    from gptopt.evaluate_masked import score_masked

    if opened.tokenizer.mask_id is None:
        raise UserError(
            f"{options.model}: is a masked language model whose tokenizer has "
            f"no mask token; restore its files"
        )
    scored = score_masked(
        opened.guesser(), split, Masking.of(opened.tokenizer), vocab_size=opened.vocab_size,
        block_size=opened.block_size, batch_size=options.batch_size, max_tokens=options.max_tokens,
        show=True,
    )  # fmt: skip
    if scored is None:
        raise UserError(f"the {split.name} split is too short for one masked token; give more text")
    return {"val_loss": scored.loss, "tokens": scored.tokens, "bits_per_byte": None,
            "accuracy": scored.accuracy}  # fmt: skip


class _Opened(NamedTuple):
    """A model that is to be scored, and where it runs."""

    model: Any  # nn.Module or EdgeModel
    tokenizer: Tokenizer
    block_size: int
    vocab_size: int
    causal: bool
    where: dict[str, str]
    labels: list[str] | None = None
    multi_label: bool = False

    def scorer(self) -> Scorer:
        edge = isinstance(self.model, EdgeModel)
        return edge_scorer(self.model) if edge else torch_scorer(self.model)

    def guesser(self) -> "Guesser":
        from gptopt.evaluate_masked import edge_guesser, torch_guesser

        edge = isinstance(self.model, EdgeModel)
        return edge_guesser(self.model) if edge else torch_guesser(self.model)

    def labeller(self) -> "LabelForward":
        if isinstance(self.model, EdgeModel):
            edge = self.model
            return lambda ids, mask: edge.forward(ids, mask)[0]
        from gptopt.generate import labeller

        return labeller(self.model)


def _score_labels(opened: _Opened, labels: list[str], options: EvaluateOptions) -> dict[str, Any]:
    from gptopt.evaluate_labels import evaluate_labels, show_scores

    scored = evaluate_labels(
        opened.labeller(), opened.tokenizer, options, labels=labels,
        multi_label=opened.multi_label, block_size=opened.block_size,
    )  # fmt: skip
    result = {**scored, **opened.where}
    if not options.json_output:
        show_scores(result)
    return result


def _open_model(options: EvaluateOptions) -> _Opened:
    if not is_edge_folder(Path(options.model)):
        return _open_torch(options)
    if options.kernels != "auto" or options.checkpoint != "auto":
        raise UserError(
            f"{options.model}: is an exported folder, which knows no --kernels and no --checkpoint"
        )
    provider = "cpu" if options.device == "auto" else options.device
    edge = EdgeModel(Path(options.model), adapter=options.adapter, provider=provider)
    if edge.tokenizer is None:
        raise UserError(f"{options.model}: was exported without a tokenizer, so it reads no text")
    where = {"provider": edge.provider}
    causal = edge.config["causal"]
    return _Opened(
        edge, edge.tokenizer, edge.block_size, edge.vocab_size, causal, where,
        edge.config["labels"], edge.config["multi_label"],
    )  # fmt: skip


def _open_torch(options: EvaluateOptions) -> _Opened:
    from gptopt.checkpoint import load_model
    from gptopt.training.hardware import resolve_device

    device = resolve_device(options.device)
    loaded = load_model(
        options.model, checkpoint=options.checkpoint, device=device, kernels=options.kernels,
        adapter=options.adapter,
    )  # fmt: skip
    if loaded.tokenizer is None:
        raise UserError(
            f"{loaded.folder}: has no tokenizer.json, so its ids cannot be compared with the "
            f"data's; copy the tokenizer it was trained with there"
        )
    config, where = loaded.model.config, {"device": str(device)}
    assert config.vocab_size is not None
    return _Opened(
        loaded.model, loaded.tokenizer, config.block_size, config.vocab_size, config.causal, where,
        labels_of(config), getattr(config, "multi_label", False),
    )  # fmt: skip


def _choose(dataset: "Dataset | Mixture", name: str) -> "TokenSplit":
    if name == "auto":
        name = "val" if len(dataset.val) else "train"
    return dataset.split(name)


def _bits_per_byte(
    loss: float, tokens: int, split: "TokenSplit", tokenizer: Tokenizer
) -> float | None:
    if tokens > _DECODED_TOKENS:
        return None
    text = tokenizer.decode(split.batch([0], tokens)[0, 1:])
    size = len(text.encode("utf-8", "replace"))
    return loss * tokens / math.log(2) / size if size else None


def _show(result: dict[str, Any]) -> None:
    bits, right = result["bits_per_byte"], result["accuracy"]
    perplexity = result["perplexity"]
    say(
        f"{result['split']}: loss {result['val_loss']:.4f}"
        + ("" if perplexity is None else f", perplexity {perplexity:.4g}")
        + ("" if bits is None else f", {bits:.4f} bits per byte")
        + ("" if right is None else f", {right:.1%} of masked tokens guessed")
        + f", {result['tokens']:,} tokens in {result['seconds']:.1f} s "
        f"({result['tokens_per_second']:,.0f} tokens/s)"
    )
