"""Playing tokens through an exported graph in onnxruntime, and keeping count of what was said."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime

from gptopt.errors import CheckFailed, first_line
from gptopt.export.contract import Contract

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Session:
    """An onnxruntime session on the CPU, with the contract's inputs and outputs by name."""

    def __init__(self, path: Path, contract: Contract) -> None:
        self.contract = contract
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they are raised as well
        # Threads that wait actively would take the cores from PyTorch, which runs in between.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no public base class
            raise CheckFailed(
                f"{path}: onnxruntime {onnxruntime.__version__} refuses it ({first_line(error)})"
            ) from error
        self._check_names(path)
        self._past_names = list(contract.inputs())[3:]

    def run(self, ids: Ids, mask: Ids, positions: Ids, past: list[Floats]) -> list[Floats]:
        """Logits (B, T, V) and, of a model with a cache, every present (B, K, S, D)."""
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {**tokens, **dict(zip(self._past_names, past, strict=True))}
        try:
            outputs: list[Floats] = self._session.run(None, feeds)
        except Exception as error:
            raise CheckFailed(
                f"onnxruntime cannot run the graph for ids {ids.shape} and mask {mask.shape} "
                f"({first_line(error)})"
            ) from error
        return outputs

    def empty_past(self, rows: int) -> list[Floats]:
        """The cache before the first token."""
        shape = (rows, self.contract.kv_heads, 0, self.contract.head_size)
        return [np.zeros(shape, dtype=np.float32) for _ in self._past_names]

    def _check_names(self, path: Path) -> None:
        for kind, found, wanted in (
            ("inputs", self._session.get_inputs(), self.contract.inputs()),
            ("outputs", self._session.get_outputs(), self.contract.outputs()),
        ):
            shapes = {value.name: tuple(value.shape) for value in found}
            if shapes != wanted:
                names = {**wanted, **shapes}
                wrong = next(name for name in names if shapes.get(name) != wanted.get(name))
                raise CheckFailed(
                    f"{path}: its {kind} are not those of the contract, see {wrong!r}: "
                    f"found {shapes.get(wrong)}, expected {wanted.get(wrong)}"
                )


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
        session: the graph.
        rows: B.
        offset: position id of the first token.
    """

    def __init__(self, session: Session, rows: int, offset: int = 0) -> None:
        self.claims: list[Claim] = []
        self._session = session
        self._offset = offset
        self._said: list[tuple[int, ...]] = [()] * rows
        self._mask = np.zeros((rows, 0), dtype=np.int64)
        self._past = session.empty_past(rows)

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
        logits, *self._past = self._session.run(ids, self._mask, positions, self._past)
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
        self._past = [part[chosen] for part in self._past]
        self._mask = self._mask[chosen]
        self._said = [self._said[row] for row in rows]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; no row may be padded."""
        self._past = [part[:, :, :length] for part in self._past]
        self._mask = self._mask[:, :length]
        self._said = [tokens[:length] for tokens in self._said]


def as_ids(rows: Any) -> Ids:
    """(B, T) int64."""
    return np.asarray(rows, dtype=np.int64)
