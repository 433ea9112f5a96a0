"""What the user sees: results on stdout, progress and messages on stderr.

On a terminal progress is one live line; elsewhere it is a plain line now and then. Modules log
through `logging.getLogger(__name__)`; this module only shows it.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

_PLAIN_EVERY_S = 10.0
_LIVE: list["Progress"] = []  # displays that are open now


def configure(*, quiet: bool = False, debug: bool = False) -> None:
    """Send the package's log records to stderr, one line each."""
    logger = logging.getLogger("gptopt")
    for old in list(logger.handlers):
        logger.removeHandler(old)
    handler = _Handler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # generic in stubs alone
    def emit(self, record: logging.LogRecord) -> None:
        """Show a record on a line of its own, above the live one."""
        for shown in _LIVE:
            shown.close()
        super().emit(record)


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def say(text: str = "", *, end: str = "\n") -> None:
    """A result, on stdout, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


class Progress:
    """A count that moves towards a total, shown with a few named figures."""

    def __init__(self, total: float | None, unit: str) -> None:
        self.total = total
        self.unit = unit
        self.done = 0.0
        self._live = sys.stderr.isatty()
        self._width = 0
        self._started = self._shown = time.monotonic()

    def update(self, amount: float = 1, **shown: Any) -> None:
        """Move on by `amount`; the named figures appear behind the count, floats with 4 digits."""
        self.done += amount
        now = time.monotonic()
        if now - self._shown >= (0.1 if self._live else _PLAIN_EVERY_S):
            self._shown = now
            self._show(self._line(now, shown))

    def _line(self, now: float, shown: dict[str, Any]) -> str:
        count = f"{self.done:,.0f}"
        if self.total:
            count += f"/{self.total:,.0f}"
        figures = [f"{key} {_figure(value)}" for key, value in shown.items()]
        return "  ".join([f"{count} {self.unit}", *figures, f"{now - self._started:.0f} s"])

    def _show(self, line: str) -> None:
        if self._live:
            sys.stderr.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Clear the live line."""
        if self._live and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()


@contextlib.contextmanager
def progress(total: float | None, unit: str) -> Iterator[Progress]:
    """A progress display that is cleared when the block ends."""
    shown = Progress(total, unit)
    _LIVE.append(shown)
    try:
        yield shown
    finally:
        _LIVE.remove(shown)
        shown.close()


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
