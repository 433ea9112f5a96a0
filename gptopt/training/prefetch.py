"""The next micro-batches are read while the device computes."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gptopt.training.objective import Batch, Batches


class Prefetched:
    """Batches read ahead by one thread; the position is that of what was handed out.

    Args:
        batches: nobody else may call them from now on.
        ahead: how many are read before they are asked for.

    Attributes:
        waited: seconds that `next` has waited for text; the reader sets it back.
    """

    def __init__(self, batches: Batches, ahead: int) -> None:
        self._batches, self._depth = batches, ahead
        self._state = batches.state_dict()
        self._ahead: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()
        self._reader = ThreadPoolExecutor(1, "batches")
        self.waited = 0.0

    def next(self) -> Batch:
        """The next one; what reading it raised is raised here."""
        started = time.monotonic()
        self._fill()
        batch, self._state = self._ahead.popleft().result()
        self._fill()
        self.waited += time.monotonic() - started
        return batch

    def _fill(self) -> None:
        while len(self._ahead) < self._depth:
            self._ahead.append(self._reader.submit(self._read))

    def _read(self) -> tuple[Batch, dict[str, Any]]:
        return self._batches.next(), self._batches.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch that was handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; what was read ahead is forgotten."""
        while self._ahead:
            self._ahead.popleft().exception()  # waits: the reader must be idle
        self._batches.load_state_dict(state)
        self._state = state
