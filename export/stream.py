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
from gptopt.errors import CheckFailed, first_line
from gptopt.export.contract import Contract
from gptopt.runtime.folder import EdgeConfig
from gptopt.runtime.session import Session

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Runner(Protocol):
    """A graph in a runtime."""

    def run(
        self, ids: Ids, mask: Any, position_ids: Ids, past: Sequence[Any]
    ) -> tuple[Floats, list[Any]]:
        """Logits (B, T, V) and the cache behind them; an empty `past` is the beginning."""


def open_graph(path: Path, config: ModelConfig) -> Session:
    """Load an ONNX file on the CPU, after its names were compared with the contract.

    Raises:
        CheckFailed: onnxruntime refuses the file, or the contract is broken.
    """
    _check_names(path, Contract.of(config))
    assert config.vocab_size is not None
    sizes = EdgeConfig(
        n_layer=config.n_layer,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        vocab_size=config.vocab_size,
        tokenizer_size=config.vocab_size,
        block_size=config.block_size,
        causal=config.causal,
        eos_ids=[],
    )
    return Session(path, sizes, "cpu", 0)


def _check_names(path: Path, contract: Contract) -> None:
    """Every name and dimension: clients rely on the letters of each."""
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own
        raise CheckFailed(f"{path}: is no ONNX file ({first_line(error)})") from error
    for kind, values, wanted in (
        ("inputs", graph.inputs, contract.inputs()),
        ("outputs", graph.outputs, contract.outputs()),
    ):
        found = {value.name or "": _dims(value) for value in values}
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                raise CheckFailed(
                    f"{path}: its {kind} are not those of the contract, see {name!r}: "
                    f"found {found.get(name)}, expected {wanted.get(name)}"
                )


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
    """

    def __init__(self, graph: Runner, rows: int, offset: int = 0) -> None:
        self.claims: list[Claim] = []
        self._graph = graph
        self._offset = offset
        self._said: list[tuple[int, ...]] = [()] * rows
        self._mask = np.zeros((rows, 0), dtype=np.int64)
        self._past: list[Any] = []

    def feed(self, ids: Ids, real: Ids | None = None, *, keep: int | None = None) -> Floats:
        """Feed ids (B, T), of which only the real ones count (B, T); all by default.

        Returns:
            logits (B, T, V).

        Args:
            keep: claim only the last so many positions.
        """
        T = ids.shape[1]
        real = np.ones_like(ids) if real is None else real
        self._mask = np.concatenate((self._mask, real), axis=1)
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)[:, -T:] + self._offset
        logits, self._past = self._graph.run(
            ids, self._mask.astype(np.bool_), positions, self._past
        )
        for row, counted in enumerate(real.astype(bool)):
            before = self._said[row]
            self._said[row] = before + tuple(ids[row, counted].tolist())
            said = logits[row, counted]
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
