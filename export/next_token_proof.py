"""The proof of next_tokens: the graph's choice from its own scores, which are proven apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.config import ModelConfig, SamplingOptions
from gptopt.export.contract import KEEP, NEXT, SAMPLING
from gptopt.export.next_token import noise_of
from gptopt.runtime.sampling import probabilities
from gptopt.runtime.variants import EdgeFile

_SEED = 40
_TIE = 1e-4  # of two sums: what float32 leaves open
# seed, temperature, top_k, top_p
_SAMPLINGS = ((0, 1.0, 50, 1.0), (7, 0.8, 0, 0.9), (2**40 + 3, 1.3, 5, 0.7), (-1, 0.0, 20, 0.5))

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}

Array = npt.NDArray[Any]


@dataclass(kw_only=True, slots=True)
class Chosen:
    """Next tokens of a graph, each compared with the choice from the scores beside it.

    A near tie is a token whose score and noise are the best one's but for rounding.
    """

    tokens: int = 0
    agreeing: int = 0
    near_ties: int = 0
    first_bad: str | None = None


def prove_next_tokens(
    path: Path, config: ModelConfig, file: EdgeFile, vocab_size: int | None = None
) -> Chosen:
    """Play a padded batch, a prompt of which the last position is scored, and one more token.

    Args:
        path: an ONNX file with the output next_tokens.
        config: the model's.
        file: what is known of the file.
        vocab_size: ids that may be chosen; none: all that the model knows.
    """
    random, result, graph = np.random.default_rng(_SEED), Chosen(), _Graph(path, config, file)
    size = vocab_size or config.vocab_size
    assert size is not None
    T, right = max(1, min(7, config.block_size - 1)), file.padding == "right"
    for options in _SAMPLINGS if file.tokens == "sample" else (None,):
        mask = np.ones((3, T), np.int64)
        mask[1, T // 2 + 1 :] = 0
        mask[2, 1:] = 0
        for case, real in (("right padding", mask), ("left padding", mask[:, ::-1])):
            if not (right and case == "left padding"):
                ids = random.integers(0, size, (3, T))
                _compare(graph, size, ids, real, [], options, result, case)
        whole = np.ones((1, T + 1), np.int64)
        ids = random.integers(0, size, (1, T + 1))
        cache = _compare(graph, size, ids[:, :T], whole[:, :T], [], options, result, "prompt", 1)
        if config.block_size > T:
            _compare(graph, size, ids[:, T:], whole, cache, options, result, "one token")
    return result


class _Graph:
    """A file in onnxruntime, with every input that it has."""

    def __init__(self, path: Path, config: ModelConfig, file: EdgeFile) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._static = file.cache == "static"
        self._keeps = KEEP in {each.name for each in self._session.get_overridable_initializers()}
        self._past = [
            (each.name, _TYPES[each.type])
            for each in self._session.get_inputs()
            if each.name.startswith("past_key_values.")
        ]
        self._shape = (config.kv_heads, config.head_size)

    def run(
        self, ids: Array, mask: Array, order: Array, past: list[Array], keep: int,
        options: dict[str, Array],
    ) -> tuple[Array, Array, list[Array]]:  # fmt: skip
        """Scores, next tokens and the cache."""
        (B, T), (K, D) = ids.shape, self._shape
        room = T if self._static else 0
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": order, **options}
        for index, (name, dtype) in enumerate(self._past):
            held = past[index] if past else np.zeros((B, K, 0, D), dtype)
            feeds[name] = np.pad(held, ((0, 0), (0, 0), (0, room), (0, 0)))
        if keep and self._keeps:
            feeds[KEEP] = np.array([keep], np.int64)
        present = [name.replace("past_key_values", "present") for name, _ in self._past]
        found = self._session.run(["logits", NEXT, *present], feeds)
        return found[0], found[1], found[2:]


def _compare(
    graph: _Graph, size: int, ids: Array, mask: Array, cache: list[Array],
    options: tuple[int, float, int, float] | None, result: Chosen, case: str, keep: int = 0,
) -> list[Array]:  # fmt: skip
    """Play one call; the cache behind it."""
    T = ids.shape[1]
    order = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -T:]
    extra: dict[str, Array] = {}
    if options is not None:
        pairs = zip(SAMPLING.items(), options, strict=True)
        extra = {name: np.array([given], default.dtype) for (name, default), given in pairs}
    logits, chosen, present = graph.run(ids, mask, order, cache, keep, extra)
    last = T - 1 - mask[:, -T:][:, ::-1].argmax(axis=1)  # (B,)
    for row, at in enumerate(last):
        scores = logits[row, at - T + logits.shape[1], :size].astype(np.float64)
        sums = scores if options is None else _sums(scores, row, int(order[row, at]), options)
        wanted, mine = int(sums.argmax()), int(chosen[row, 0])
        result.tokens += 1
        if mine == wanted:
            result.agreeing += 1
        elif mine < size and sums[wanted] - sums[mine] <= _TIE:
            result.near_ties += 1
        elif result.first_bad is None:
            result.first_bad = f"{case}: row {row} chose {mine}, its scores say {wanted} of {size}"
    return present


def _sums(scores: Array, row: int, position: int, options: tuple[int, float, int, float]) -> Array:
    """Scores and noise of the tokens that the filters leave, -inf of the others."""
    seed, temperature, top_k, top_p = options
    if temperature == 0:
        return scores
    sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    left = probabilities(scores[None], sampling)[0] > 0
    noise = noise_of(seed, row, position, np.arange(len(scores)))
    return np.where(left, scores + temperature * noise, -np.inf)
