"""SIGINT and SIGTERM end a run at the next step, saved; a second one ends it at once."""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)


class Signals:
    """While entered, remembers the first signal instead of dying from it."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        assert self.caught is not None
        return 128 + self.caught

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; elsewhere the host program owns them.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            # What is saved stays: folders are renamed into place whole, leftovers go at the next
            # start. Nothing that could wait or raise may run here.
            os._exit(128 + number)
        self.caught = signal.Signals(number)
        logger.warning(
            "%s: finishing this step, then saving; once more to stop at once", self.caught.name
        )
