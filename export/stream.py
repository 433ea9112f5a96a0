"""Playing tokens through an exported graph as a client does, and keeping count of what was said.

The graph runs in the session of gptopt.runtime: what is proven is what runs later.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gptopt.config import ModelConfig
from gptopt.config_classifier import labels_of
from gptopt.errors import CheckFailed, first_line
from gptopt.export.contract import KEEP, SAMPLING, Contract
from gptopt.runtime.adapters import SUFFIXES
from gptopt.runtime.folder import EdgeConfig
from gptopt.runtime.session import Session
from gptopt.runtime.variants import EdgeFile

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Runner(Protocol):
    """A graph in a runtime.

    Attributes:
        shared: the cache it returns is the one it was given, written in place, with room behind.
    """

    shared: bool

    def run(
        self, ids: Ids, mask: Any, position_ids: Ids, past: Sequence[Any], keep: int = 0
    ) -> tuple[Floats, list[Any]]:
        """Logits (B, T, V) and the cache behind them; an empty `past` is the beginning.

        `keep` asks for the logits of the last so many positions, 0 for all.
        """


class Growing:
    """A graph that makes a new, longer cache every time, as most clients run it."""

    shared = False

    def __init__(self, session: Session) -> None:
        self.run = session.run


class Shared:
    """A graph that writes into one buffer, bound as past and as present.

    What was never written is NaN, where the type has one: a kernel that reads it shows.
    """

    shared = True

    def __init__(self, session: Session, capacity: int) -> None:
        self._session = session
        self._capacity = capacity

    def run(
        self, ids: Ids, mask: Any, position_ids: Ids, past: Sequence[Any], keep: int = 0
    ) -> tuple[Floats, list[Any]]:
        """See Runner."""
        session, binding = self._session, self._session.new_binding()
        parts = list(past) or [self._buffer(len(ids)) for _ in session.past]
        feeds = [np.ascontiguousarray(array, np.int64) for array in (ids, mask, position_ids)]
        for name, array in zip(("input_ids", "attention_mask", "position_ids"), feeds, strict=True):
            binding.bind_cpu_input(name, array)
        shape = (len(ids), keep or ids.shape[1], session.vocab_size)
        logits = np.full(shape, np.nan, session.logits_dtype)
        binding.bind_output("logits", "cpu", 0, logits.dtype, shape, logits.ctypes.data)
        for past_name, name, part in zip(session.past, session.present, parts, strict=True):
            place = ("cpu", 0, part.dtype, part.shape, part.ctypes.data)
            binding.bind_input(past_name, *place)
            binding.bind_output(name, *place)
        if keep:
            binding.bind_ortvalue_input(KEEP, session.kept(keep))
        session.execute(binding)
        return logits.astype(np.float32, copy=False), parts

    def _buffer(self, rows: int) -> npt.NDArray[Any]:
        K, D = self._session.cache_shape
        dtype = np.dtype(self._session.cache_dtype)
        return np.full((rows, K, self._capacity, D), np.nan if dtype.kind == "f" else 99, dtype)


def open_graph(
    path: Path, config: ModelConfig, file: EdgeFile | None = None, weights: Path | None = None
) -> Session:
    """Load an ONNX file on the CPU, after its names were compared with the contract.

    Args:
        path: the ONNX file.
        config: the model's.
        file: what is known of the file; none: a growing cache, padding anywhere.
        weights: the folder of its data, where that is not its own.

    Raises:
        CheckFailed: onnxruntime refuses the file, or the contract is broken.
    """
    file = file or EdgeFile()
    contract = Contract.of(config, static=file.cache == "static", next_token=file.tokens != "none")
    _check_names(path, contract)
    assert config.vocab_size is not None
    sizes = EdgeConfig(
        n_layer=config.n_layer,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        vocab_size=config.vocab_size,
        tokenizer_size=config.vocab_size,
        block_size=config.block_size,
        causal=contract.causal,
        labels=labels_of(config),
        multi_label=False,
        eos_ids=[],
    )
    return Session(path, sizes, "cpu", file=file, weights=weights)


def _check_names(path: Path, contract: Contract) -> None:
    """Every name and dimension: clients rely on the letters of each."""
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own
        raise CheckFailed(f"{path}: is no ONNX file ({first_line(error)})") from error
    for kind, values, wanted in (
        ("inputs", [each for each in graph.inputs if not _is_optional(each)], contract.inputs()),
        ("outputs", graph.outputs, contract.outputs()),
    ):
        found = {value.name or "": _dims(value) for value in values}
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                raise CheckFailed(
                    f"{path}: its {kind} are not those of the contract, see {name!r}: "
                    f"found {found.get(name)}, expected {wanted.get(name)}"
                )


def _is_optional(value: ir.Value) -> bool:
    """Whether clients that do not know an input never see it: it has a default."""
    name = value.name or ""
    return value.is_initializer() and (name in (KEEP, *SAMPLING) or name.endswith(SUFFIXES))


def _dims(value: ir.Value) -> tuple[int | str | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


class Claim(NamedTuple):
    """The graph says: these are the logits at `tokens[first:]`, in a text of just these tokens."""

    tokens: tuple[int, ...]
    first: int
    logits: Floats  # (len(tokens) - first, V)
    row: int
    offset: int  # position id of tokens[0]


class Stream:
    """Rows of tokens that are fed piece by piece, as a client does; every answer is a claim.

    Args:
        graph: what runs it.
        rows: B.
        offset: position id of the first token.
        by_column: several rows add one token each at a time to a cache that is not empty, because
            GroupQueryAttention on the CPU refuses more.
    """

    def __init__(self, graph: Runner, rows: int, offset: int = 0, by_column: bool = False) -> None:
        self.claims: list[Claim] = []
        self._graph = graph
        self._offset = offset
        self._by_column = by_column and rows > 1
        self._said: list[tuple[int, ...]] = [()] * rows
        self._mask = np.zeros((rows, 0), dtype=np.int64)
        self._past: list[Any] = []

    def feed(
        self, ids: Ids, real: Ids | None = None, *, keep: int | None = None, scores: int = 0
    ) -> Floats:
        """Feed ids (B, T), of which only the real ones count (B, T); all by default.

        Returns:
            logits (B, T, V), or those of the last `scores` positions.

        Args:
            keep: claim only the last so many positions.
            scores: ask the graph for the last so many only, 0 for all; no row may be padded.
        """
        real = np.ones_like(ids) if real is None else real
        if self._by_column and self._past and ids.shape[1] > 1:
            columns = range(ids.shape[1])
            parts = [self._feed(ids[:, [t]], real[:, [t]], keep, 0) for t in columns]
            return np.concatenate(parts, axis=1)
        return self._feed(ids, real, keep, scores)

    def _feed(self, ids: Ids, real: Ids, keep: int | None, scores: int) -> Floats:
        T = ids.shape[1]
        self._mask = np.concatenate((self._mask, real), axis=1)
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)[:, -T:] + self._offset
        logits, self._past = self._graph.run(
            ids, self._mask.astype(np.bool_), positions, self._past, scores
        )
        for row, counted in enumerate(real.astype(bool)):
            self._said[row] += tuple(ids[row, counted].tolist())
            if logits.ndim == 2:  # of the whole text
                said = logits[row, None]
            else:
                said = logits[row] if scores else logits[row, counted]
            said = said if keep is None else said[-keep:]
            if len(said):
                tokens = self._said[row]
                first = len(tokens) - len(said)
                self.claims.append(Claim(tokens, first, said.copy(), row, self._offset))
        return logits

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i continue what row rows[i] has said, as a beam search does."""
        chosen = np.asarray(rows)
        self._past = [_array(part)[chosen] for part in self._past]
        self._mask = self._mask[chosen]
        self._said = [self._said[row] for row in rows]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; no row may be padded."""
        if not self._graph.shared:
            self._past = [_array(part)[:, :, :length] for part in self._past]
        self._mask = self._mask[:, :length]
        self._said = [tokens[:length] for tokens in self._said]


def _array(part: Any) -> Floats:
    """A part of the cache as an array: a runtime may keep it as a value of its own."""
    found: Floats = part if isinstance(part, np.ndarray) else part.numpy()
    return found


def as_ids(rows: Any) -> Ids:
    """(B, T) int64."""
    return np.asarray(rows, dtype=np.int64)
