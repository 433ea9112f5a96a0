"""What a run folder holds beside its checkpoints: resolved options and log; and what it is not."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptopt.config import LoopOptions
from gptopt.errors import UserError
from gptopt.manifest import write_text
from gptopt.training.lock import LOCK

CONFIG = "config.toml"
LOG = "log.txt"
_NOT_SAVED = {"resume", "dry_run", "json_output", "preset"}  # a preset's values are in [model]


def refuse_foreign(out: Path) -> None:
    """A folder with something else in it is not taken for a run folder.

    Raises:
        UserError: it is a file, or a folder that no trainer made.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / LOCK).exists():
        raise UserError(f"{out}: is not empty and not a run folder; choose another --out")


def write_config(out: Path, options: LoopOptions) -> None:
    """The options as TOML that `gptopt train --config` reads back."""
    write_text(out / CONFIG, to_toml(options.model_dump(exclude=_NOT_SAVED)))


def to_toml(values: dict[str, Any], table: str = "") -> str:
    """A nested dict as TOML. None is left out: an absent key is how TOML says it."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"[{table}]"] if table else []
    lines += [f"{key} = {_toml(value)}" for key, value in plain.items() if value is not None]
    text = "\n".join(lines) + "\n"
    for key, value in values.items():
        if isinstance(value, dict):
            text += "\n" + to_toml(value, f"{table}.{key}" if table else key)
    return text


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON writes text, numbers and booleans as TOML does, but leaves one control character bare.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextlib.contextmanager
def log_to_file(out: Path) -> Iterator[None]:
    """Keep every message of this package in RUN/log.txt too, with its time."""
    try:
        handler = _LogFile(out / LOG, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out / LOG}: cannot be written ({error.strerror})") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("gptopt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A log line that the disk refuses is not worth the run: saving reports a full disk."""
