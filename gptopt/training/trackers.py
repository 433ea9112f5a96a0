"""`--track`: the lines of metrics.jsonl, to TensorBoard, Weights & Biases or Trackio as well.

Their packages are imported only when asked for. What they do with the lines is theirs; a run never
ends because of a tracker that does.
"""

import contextlib
import importlib
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from gptopt.config import LoopOptions
from gptopt.errors import UserError, first_line
from gptopt.manifest import read_json, write_json
from gptopt.training.metrics import Line

logger = logging.getLogger(__name__)

TRACKING = "tracking.json"  # the name under which trackers know the run, for a resume
EVENTS = "tensorboard"
_PROJECT = "gptopt"
# What has to be installed, one of them, and how a user gets it.
_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


@dataclass(frozen=True)
class Start:
    """What a tracker is told of a run.

    Attributes:
        out: the run folder.
        id: the run's name, which no other run has.
        options: the verb's, as JSON.
        first_step: steps from this one on are told (again).
    """

    out: Path
    id: str
    options: dict[str, Any]
    first_step: int


class Tracker(Protocol):
    """One that is told every line of a run."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """The figures of a step."""

    def finish(self, *, failed: bool) -> None:
        """The run ends here, complete or not."""


class _TensorBoard:
    def __init__(self, start: Start) -> None:
        # torch's own writer is the one that is documented; it needs the package tensorboard.
        there = find_spec("tensorboard") is not None
        module = importlib.import_module("torch.utils.tensorboard" if there else "tensorboardX")
        folder = start.out / EVENTS
        # What was written of steps that a killed run takes again is no longer shown.
        self._writer = module.SummaryWriter(str(folder), purge_step=start.first_step)
        self._writer.add_text("options", "    " + json.dumps(start.options), 0)
        logger.info("tensorboard --logdir %s", folder)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, start: Start) -> None:
        self._run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=start.id,
            name=start.id,
            resume="allow",
            dir=str(start.out),
            config=start.options,
            settings={"console": "off"},  # metrics are asked for, not what the terminal shows
        )

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, start: Start) -> None:
        self._module = importlib.import_module("trackio")
        self._module.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=start.id,
            resume="allow",
            config=start.options,
            embed=False,
        )

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._module.log(figures, step=step)

    def finish(self, *, failed: bool) -> None:
        self._module.finish()


_KINDS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse what cannot be told to anybody before any work is done.

    Raises:
        UserError: the package of one is not installed.
    """
    for name in names:
        packages = _PACKAGES[name]
        if not any(find_spec(package) for package in packages):
            raise UserError(
                f"--track {name}: needs the package {' or '.join(packages)}, which is not"
                f" installed; pip install 'gptopt[{name}]', or leave it out"
            )


class Trackers:
    """The trackers of one run: started on rank 0 alone, told every line, finished with the run."""

    def __init__(self) -> None:
        self._running: dict[str, Tracker] = {}

    def start(self, options: LoopOptions, out: Path, *, first_step: int) -> None:
        """Begin, or go on with the run that trackers know already.

        Args:
            options: `track` names the trackers.
            out: the run folder.
            first_step: of the first line that will be told; 0 is a new run.

        Raises:
            UserError: a tracker does not start.
        """
        if not options.track:
            return
        told = options.model_dump(mode="json", exclude={"resume", "json_output"})
        start = Start(out, _identity(out, new=first_step == 0), told, first_step)
        for name in dict.fromkeys(options.track):
            try:
                with _silent_stdout():
                    self._running[name] = _KINDS[name](start)
            except Exception as error:
                raise UserError(
                    f"--track {name}: does not start ({first_line(error)}); set it up as its"
                    f" documentation says, or leave it out"
                ) from None

    def log(self, line: Line) -> None:
        """Tell a line of metrics.jsonl: its numbers, without the nulls."""
        figures = {
            name: value
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        for name, tracker in list(self._running.items()):
            try:
                with _silent_stdout():
                    tracker.log(line["step"], figures)
            except Exception as error:
                del self._running[name]
                logger.warning(
                    "--track %s: failed (%s) and is told nothing more; the run goes on, and its"
                    " metrics.jsonl has every line",
                    name, first_line(error),
                )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, tracker in self._running.items():
            try:
                with _silent_stdout():
                    tracker.finish(failed=kind is not None)
            except Exception as failure:
                logger.warning("--track %s: did not finish (%s)", name, first_line(failure))


def _identity(out: Path, *, new: bool) -> str:
    """The run's name for trackers, kept in the run folder."""
    path = out / TRACKING
    if not new and path.is_file():
        found = read_json(path).get("id")
        if isinstance(found, str) and re.fullmatch(r"[\w.-]{1,100}", found, re.ASCII):
            return found
        raise UserError(f"{path}: id is {found!r}, no name of a run; remove the file to begin anew")
    name = re.sub(r"[^\w.-]+", "-", out.resolve().name, flags=re.ASCII)[:80]
    found = f"{name}-{secrets.token_hex(4)}"  # not from the run's own random numbers
    write_json(path, {"id": found})
    return found


def _silent_stdout() -> contextlib.redirect_stdout[Any]:
    """Results alone stand on stdout, whatever a tracker prints."""
    return contextlib.redirect_stdout(sys.stderr)
