"""SIGINT and SIGTERM end a run at the next step, saved; a second one ends it at once."""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)


class SignalCame(Exception):
    """A signal asks the run to end; raised where nothing is half done."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Signals:
    """While entered, remembers the first signal instead of dying from it.

    Args:
        patient: a second one is no reason to hurry. A launcher passes on what the terminal has
            already sent to its workers, and ends those that take too long itself.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.caught: signal.Signals | None = None
        self._patient = patient
        self._old: dict[signal.Signals, Any] = {}

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
        if self.caught is not None and self._patient:
            return
        if self.caught is not None:
            # What is saved stays: folders are renamed into place whole, leftovers go at the next
            # start. Nothing that could wait or raise may run here.
            os._exit(128 + number)
        self.caught = signal.Signals(number)
        more = "" if self._patient else "; once more to stop at once"
        logger.warning("%s: finishing this step, then saving%s", self.caught.name, more)
