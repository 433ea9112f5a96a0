"""How good a file is: what it makes of a text that it was not calibrated on.

The proof (validate.py) says that a graph computes what its weights say. What rounding the weights
did to the model is measured here, beside the PyTorch model, on the same positions.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gptopt.errors import UserError
from gptopt.export.stream import Growing, open_graph
from gptopt.export.texts import MIN_HELD_OUT
from gptopt.export.trace import Exportable
from gptopt.precisions import Allowed
from gptopt.runtime.variants import EdgeFile

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

_WINDOWS = 8
_WINDOW = 256  # tokens
_KEPT = 2**26  # probabilities of the model that are kept, 256 MiB
_AT_ONCE = 64  # positions that are compared at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What a file makes of a held-out text.

    Attributes:
        positions: that were compared.
        mean_kl: Kullback-Leibler divergence of the file from the model, nats per position.
        max_kl: the largest one.
        agreement: share of positions whose likeliest token is the model's.
        perplexity: of the file; none for a bidirectional model.
        model_perplexity: of the PyTorch model.
        standard_error: of the logarithm of the ratio of the two.
        allowed: what the precision may cost.
    """

    positions: int
    mean_kl: float
    max_kl: float
    agreement: float
    perplexity: float | None
    model_perplexity: float | None
    standard_error: float | None
    allowed: Allowed

    @property
    def increase(self) -> float | None:
        """By what part the perplexity is above the model's."""
        if self.perplexity is None or self.model_perplexity is None:
            return None
        return self.perplexity / self.model_perplexity - 1

    @property
    def failure(self) -> str | None:
        """What costs more than is allowed, in a line; None where nothing does."""
        allowed, increase = self.allowed, self.increase
        limit = allowed.perplexity
        if increase is not None and limit is not None and not increase <= limit:
            return (
                f"perplexity {self.perplexity:.4g} is {increase:.2%} above the model's "
                f"{self.model_perplexity:.4g}, {limit:.2%} allowed"
            )
        if allowed.mean_kl is not None and not self.mean_kl <= allowed.mean_kl:
            return f"mean KL divergence {self.mean_kl:.2g}, {allowed.mean_kl:.2g} allowed"
        if allowed.agreement is not None and not self.agreement >= allowed.agreement:
            return (
                f"{self.agreement:.1%} of the likeliest tokens are the model's, at least "
                f"{allowed.agreement:.1%} expected"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {**asdict(self), "increase": self.increase, "passed": self.failure is None}


class HeldOut:
    """A text, and what the PyTorch model says of it, which files are compared with.

    Args:
        model: float32, on the CPU, in evaluation mode; as `gptopt.export.trace.Exportable`.
        ids: token ids. Up to 8 windows of up to 256 tokens are read, spread over them; fewer where
            the vocabulary is large, so that what the model says fits into 256 MiB.
        windows: instead of 8.

    Raises:
        UserError: the text is too short.
    """

    def __init__(self, model: nn.Module, ids: Sequence[int], *, windows: int = _WINDOWS) -> None:
        if len(ids) < MIN_HELD_OUT:
            raise UserError(
                f"held-out text: {len(ids)} tokens, expected at least {MIN_HELD_OUT}; give a "
                f"longer one"
            )
        config = cast(Exportable, model).config
        assert config.vocab_size is not None
        self._config = config
        window = min(_WINDOW, config.block_size)
        whole = len(ids) // window
        wanted = min(windows * _WINDOW, _KEPT // config.vocab_size) // window
        count = max(1, min(whole, wanted))
        starts = [whole * index // count * window for index in range(count)]
        self._windows = [np.array([ids[start : start + window]]) for start in starts]
        self._model = model
        self._said: list[Tensor] = []

    def measure(self, path: Path, file: EdgeFile, allowed: Allowed) -> Quality:
        """Run an ONNX file over the text.

        The second half of each window is read behind a cache that holds the first.

        Raises:
            CheckFailed: onnxruntime refuses the file, or it does not keep the contract.
        """
        graph = Growing(open_graph(path, self._config, file))
        window = self._windows[0].shape[1]
        cut = max(1, window // 2) if self._config.causal else window

        def run(ids: Ints) -> Tensor:
            past: list[Any] = []
            parts = []
            for start in range(0, ids.shape[1], cut):
                piece = ids[:, start : start + cut]
                places = np.arange(start, start + piece.shape[1])[None]
                mask = np.ones((1, start + piece.shape[1]), dtype=np.bool_)
                logits, past = graph.run(piece, mask, places, past)
                parts.append(torch.from_numpy(logits[0]))
            return torch.cat(parts)

        return self.compare(run, allowed)

    @torch.no_grad()
    def compare(self, run: Any, allowed: Allowed) -> Quality:
        """Compare what `run` says, logits (T, V) of ids (1, T), with what the model says."""
        divergences, agreeing, losses = [], 0, []
        for ids, said in zip(self._windows, self._model_says(), strict=True):
            logits = run(ids)[: len(said)]
            targets = torch.from_numpy(ids[0, 1:]) if self._config.causal else None
            for start in range(0, len(said), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                ours, theirs = logits[part].double().log_softmax(-1), said[part].double()
                divergences.append((theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0))
                agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
                if targets is not None:
                    wanted = targets[part].unsqueeze(1)
                    losses.append(torch.cat([-x.gather(1, wanted) for x in (ours, theirs)], dim=1))
        kl = torch.cat(divergences)
        perplexities: list[float | None] = [None, None]
        deviation = None
        if losses:
            loss = torch.cat(losses)
            perplexities = [math.exp(min(mean, 700.0)) for mean in loss.mean(0).tolist()]
            deviation = float((loss[:, 0] - loss[:, 1]).std()) / len(loss) ** 0.5
        return Quality(
            positions=len(kl),
            mean_kl=float(kl.mean()),
            max_kl=float(kl.max()),
            agreement=agreeing / len(kl),
            perplexity=perplexities[0],
            model_perplexity=perplexities[1],
            standard_error=deviation,
            allowed=allowed,
        )

    def _model_says(self) -> list[Tensor]:
        """Log-probabilities (positions, V) float32 by window; where there is a next token."""
        if not self._said:
            last = -1 if self._config.causal else None
            for ids in self._windows:
                logits: Tensor = self._model(torch.from_numpy(ids)).logits[0, :last]
                self._said.append(logits.float().log_softmax(-1))
            logger.info("held-out text: read by the model")
        return self._said
