"""Result files: one JSON object a line, the machine's first, every row on disk as it is found.

A file may hold several runs (--append): the newest row of a measurement counts. Rows of a machine
other than the last are left out, because figures of two machines do not compare.
"""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from gptopt.bench.limits import Limits
from gptopt.bench.machine import command_line, gpu, stamp
from gptopt.errors import UserError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
FILES = ("kernels", "training", "generate")
# What tells one measurement from another.
_KEYS = ("bench", "operator", "case", "dtype", "phase", "batch", "contender")


class Recorder:
    """An open result file.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(
        self, out: Path, bench: str, device: torch.device, limits: Limits, *, append: bool
    ) -> None:
        self.path = out / f"{bench}.jsonl"
        self.bench = bench
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); give another folder with --out"
            ) from None
        self.rows = 0
        self._write(machine_line(bench, device, limits))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is KeyboardInterrupt:
            logger.warning("interrupted: %d rows are kept in %s", self.rows, self.path)

    def add(self, row: Row) -> None:
        """Write one row at once."""
        self._write({"bench": self.bench, **row})
        self.rows += 1

    def _write(self, line: Row) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def machine_line(bench: str, device: torch.device, limits: Limits) -> Row:
    """The first line of a file."""
    return {
        "machine": stamp(),
        "gpu": gpu(device.index or 0) if device.type == "cuda" else None,
        "limits": limits.as_json(),
        "bench": bench,
        "command": command_line(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def read_rows(path: Path) -> tuple[Row | None, list[Row]]:
    """The last machine line of a file and the newest rows of that machine; (None, []) without one.

    The line gets `commands`: all that added rows, oldest first.

    Raises:
        UserError: the file is not what a bench writes.
    """
    if not path.is_file():
        return None, []
    machine: Row | None = None
    newest: dict[tuple[Any, ...], Row] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or (machine is None and "machine" not in line):
            raise UserError(
                f"{path}: line {number} is not a bench's; remove the file and run again"
            )
        if "machine" in line:
            same = machine is not None and device_name(machine) == device_name(line)
            if not same:
                newest.clear()
            commands = machine["commands"] if machine is not None and same else []
            machine = {**line, "commands": list(dict.fromkeys([*commands, line["command"]]))}
        else:
            newest[tuple(line.get(key) for key in _KEYS)] = line
    return machine, list(newest.values())


def device_name(machine: Row) -> str:
    """What the figures were measured on, in words."""
    return str(machine["gpu"]["name"] if machine["gpu"] else machine["machine"]["processor"])
