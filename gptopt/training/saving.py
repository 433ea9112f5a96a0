"""Checkpoints on their way to the disk: training goes on as soon as the host holds a copy."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from gptopt.errors import UserError, first_line
from gptopt.manifest import Entries, entry_of

if TYPE_CHECKING:
    from gptopt.training.session import Session

logger = logging.getLogger(__name__)

INDEX = ".index.json"  # behind the name of a file whose tensors lie in parts
Keep = Callable[[str, Tensor], Tensor]  # a tensor under its name -> what is written of it


@dataclass
class Snapshot:
    """What this rank writes of a checkpoint; the training may change everything it was taken of."""

    step: int
    weights: dict[str, Tensor]  # the whole model's, on rank 0
    moments: dict[str, Tensor]  # of the optimiser: all on rank 0, or each rank's part
    moments_file: str
    moments_index: dict[str, Any] | None  # of parts, on rank 0
    state: tuple[dict[str, Any], dict[str, Tensor]]  # counters, and random generators


class HostCopies:
    """Copies of tensors in host memory, which is used again for the next copies."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The copy; complete once the device is synchronised."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
            self._kept[name] = kept
        return kept.copy_(tensor, non_blocking=self._pinned)


class Saver:
    """Writes one checkpoint at a time, in a thread of its own.

    Rank 0 stages, renames and removes folders; the other ranks' threads write what it asks for, and
    learn how it went.
    """

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._host = HostCopies(session.device)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise, as far as is known now."""
        return self._error is not None

    def save(self) -> None:
        """Begin to write a checkpoint of this moment.

        Raises:
            UserError: it, or the one before, cannot be written; what was complete still stands.
        """
        self.wait()
        if self._session.options.sync_save:
            self._write(self._session.snapshot(lambda name, tensor: tensor))
            return
        snapshot = self._session.snapshot(self._host)
        self._thread = threading.Thread(
            target=self._try_to_write, args=(snapshot,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            UserError: what was being written could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def mark_best(self, step: int) -> None:
        """Point `best` at the checkpoint of this step, which `save` began or wrote."""
        self.wait()
        session = self._session
        if session.world.is_first:
            session.checkpoints.mark_best(step)
            self._prune()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing is being written any more when the training ends, however it ends."""
        if isinstance(error, RuntimeError) and self._session.world.size > 1:
            return  # another rank is gone: the thread may wait for it as long as it likes
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            logger.warning("%s", failure)

    def _try_to_write(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # the training thread raises it
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        session = self._session
        if session.world.is_first:
            _lead(session, snapshot)
            self._prune()
        else:
            _follow(session, snapshot)

    def _prune(self) -> None:
        options = self._session.options
        self._session.checkpoints.prune(options.keep_checkpoints, options.keep_every)


def _lead(session: "Session", snapshot: Snapshot) -> None:
    """Write rank 0's files, have the others write theirs, and tell them the outcome."""
    group = session.world.saving

    def write(folder: Path) -> Entries | None:
        if not session.world.sharded:
            session.write(folder, snapshot)
            return None
        group.from_first(["write", str(folder)])
        failed: BaseException | None = None
        try:
            session.write(folder, snapshot)
        except BaseException as error:  # raised when the others have answered
            failed = error
        nothing: list[Any] = ["", {}]
        answers = group.all(nothing)
        if failed is not None:
            raise failed
        for rank, (reason, _) in enumerate(answers):
            if reason:
                raise UserError(f"{folder.name}: rank {rank} cannot write its part ({reason})")
        return {name: entry for _, files in answers for name, entry in files.items()}

    outcome = "rank 0 could not write the checkpoint"
    try:
        session.checkpoints.save(snapshot.step, write)
        outcome = ""
    except UserError as error:
        outcome = str(error)
        raise
    finally:
        group.from_first(["done", outcome])


def _follow(session: "Session", snapshot: Snapshot) -> None:
    """Do what rank 0 asks for until it tells the outcome."""
    group = session.world.saving
    while True:
        what, value = group.from_first(["", ""])
        if what == "done":
            if value:
                raise UserError(value)
            return
        answer: list[Any] = ["", {}]
        try:
            session.write(Path(value), snapshot)
            path = Path(value) / snapshot.moments_file
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            answer[1] = {path.name: entry_of(path)}
        except (OSError, SafetensorError) as error:
            answer[0] = first_line(error)
        group.all(answer)
