"""metrics.jsonl: one line per logged step, each step once, across any number of resumes."""

import json
from pathlib import Path
from typing import Any

from gptopt.errors import UserError
from gptopt.manifest import write_text

METRICS = "metrics.jsonl"
Line = dict[str, Any]


class Metrics:
    """Appends lines and flushes each, so that a reader sees them at once."""

    def __init__(self, run: Path, name: str = METRICS) -> None:
        self.path = run / name

    def append(self, line: Line) -> None:
        """Add one line."""
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); free space, then --resume"
            ) from None

    def truncate(self, first_dropped: int) -> None:
        """Drop the lines of step `first_dropped` and later: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] < first_dropped]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
