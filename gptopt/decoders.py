"""A GPT as the generation loop sees it: its scores, and its cache in one of two forms.

TorchDecoder hands a growing cache from call to call and runs anywhere. StaticDecoder writes a cache
of fixed size in place, so that the step that reads one token can be replayed as a CUDA graph.
"""

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptopt import sampling as sampler
from gptopt.config import SamplingOptions
from gptopt.errors import first_line
from gptopt.kernels import StaticCache
from gptopt.model import GPT
from gptopt.model.block import Cache

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

logger = logging.getLogger(__name__)
_WARM_UPS = 2  # runs before a capture: kernels are compiled, workspaces allocated


class TorchDecoder:
    """A GPT with its functional cache.

    Args:
        model: a causal model.
        tokenizer_size: ids that may be chosen; None: all of the vocabulary.
    """

    def __init__(self, model: GPT, tokenizer_size: int | None) -> None:
        assert model.config.vocab_size is not None  # GPT demands it
        self.block_size = model.config.block_size
        self.vocab_size = model.config.vocab_size
        self.tokenizer_size = tokenizer_size or self.vocab_size
        self._model = model
        self._device = next(model.parameters()).device
        self._cache: list[Cache] | None = None

    def prefill(self, ids: Ints, mask: Bools) -> Tensor:
        """Forget the cache and read ids (B, T); scores (B, V) of the last position."""
        self._cache = None
        return self._read(ids, mask)

    def decode(self, ids: Ints, mask: Bools) -> Tensor:
        """Read ids (B, T) after the cache, with mask (B, S) over all; scores (B, V)."""
        return self._read(ids, mask)

    def _read(self, ids: Ints, mask: Bools) -> Tensor:
        output = self._model(
            torch.from_numpy(ids).to(self._device),
            # Without padding the mask says nothing, and attention is faster without one.
            attention_mask=None if mask.all() else torch.from_numpy(mask).to(self._device),
            past=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.present
        scores: Tensor = output.logits[:, -1]
        return scores

    def choose(
        self,
        scores: Tensor,
        sampling: SamplingOptions,
        seen: Bools | None,
        draws: npt.NDArray[np.float64],
    ) -> Ints:
        """The next token of each row, (B,)."""
        chosen = sampler.choose(
            scores,
            self.tokenizer_size,
            sampling,
            None if seen is None else torch.from_numpy(seen).to(scores.device),
            torch.from_numpy(draws),
        )
        array: Ints = chosen.cpu().numpy()
        return array


class StaticDecoder(TorchDecoder):
    """A GPT with a StaticCache of block_size tokens a row: prefill as ever, then steps in place.

    The rows lie in the cache without their padding. A finished row is read as if it were empty:
    its scores do not matter, and it takes no room.
    """

    def __init__(self, model: GPT, tokenizer_size: int | None) -> None:
        super().__init__(model, tokenizer_size)
        self._step: _Step | None = None

    def prefill(self, ids: Ints, mask: Bools) -> Tensor:
        """As TorchDecoder's; what it read is then moved into the static cache."""
        scores = super().prefill(ids, mask)
        present, self._cache = self._cache, None
        assert present is not None
        if self._step is None or self._step.batch_size != len(ids):
            self._step = _Step(self._model, _empty_cache(present, self.block_size))
        _fill(self._step.cache, present, mask)
        return scores

    def decode(self, ids: Ints, mask: Bools) -> Tensor:
        """Read ids (B, 1) into the cache; scores (B, V), which the next call overwrites."""
        assert self._step is not None, "prefill comes first"
        lengths = np.where(mask[:, -1], mask[:, :-1].sum(axis=1), 0)
        return self._step(np.stack((ids[:, 0], lengths)))


class _Step:
    """Reads one token of each row; on a GPU a CUDA graph, captured at the first call.

    Repeating a step with the same inputs changes nothing: it writes the same places of the cache,
    so warming up and capturing need no tokens of their own.
    """

    def __init__(self, model: GPT, cache: StaticCache) -> None:
        self.batch_size = len(cache.lengths)
        self.cache = cache
        self.capture = cache.lengths.device.type == "cuda"
        self._model = model
        # Tokens and lengths travel to the device in one copy.
        self._inputs = torch.zeros(
            (2, self.batch_size), dtype=torch.int64, device=cache.lengths.device
        )
        cache.lengths = self._inputs[1]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scores: Tensor | None = None

    def __call__(self, inputs: Ints) -> Tensor:
        source = torch.from_numpy(inputs)
        if self._inputs.device.type == "cuda":
            source = source.pin_memory()
        self._inputs.copy_(source, non_blocking=True)
        if self.capture and self._graph is None:
            self._try_capture()
        if self._graph is None or self._scores is None:
            return self._run()
        self._graph.replay()
        return self._scores

    def _run(self) -> Tensor:
        output = self._model(self._inputs[0][:, None], past=self.cache, logits_to_keep=1)
        scores: Tensor = output.logits[:, -1]
        return scores

    def _try_capture(self) -> None:
        device = self._inputs.device
        current = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device):
                stream = torch.cuda.Stream()
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS):
                        self._run()
                current.wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    scores = self._run()
        except RuntimeError as error:
            self.capture = False
            torch.cuda.set_stream(current)  # a capture that fails leaves its own one current
            torch.cuda.synchronize(device)
            logger.warning(
                "the decode step cannot be captured as a CUDA graph, so it runs operator by"
                " operator: %s",
                first_line(error),
            )
        else:
            self._graph, self._scores = graph, scores


def _empty_cache(present: list[Cache], max_tokens: int) -> StaticCache:
    """A static cache for rows like these."""
    keys = present[0][0]
    B, K, _, D = keys.shape
    return StaticCache(len(present), B, K, max_tokens, D, device=keys.device, dtype=keys.dtype)


def _fill(cache: StaticCache, present: list[Cache], mask: Bools) -> None:
    """Put the real tokens of left-padded rows, mask (B, T), at the beginning of the cache's."""
    T = mask.shape[1]
    padding = T - mask.sum(axis=1)
    index: Tensor | None = None
    if padding.any():
        source = np.minimum(np.arange(T) + padding[:, None], T - 1)[:, None, :, None]
        index = torch.from_numpy(source).to(present[0][0].device)  # (B, 1, T, 1)
    for layer, pair in enumerate(present):
        for static, x in zip(cache[layer], pair, strict=True):  # x: (B, K, T, D)
            static[:, :, :T] = x if index is None else x.gather(2, index.expand(x.shape))
