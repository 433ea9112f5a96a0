"""One trainer per run folder, held by the kernel so that a killed run leaves no stale lock."""

import contextlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gptopt.errors import UserError

logger = logging.getLogger(__name__)

LOCK = "lock"
_BEYOND_TEXT = 1 << 30  # Windows locks are mandatory: the text must stay readable for the message


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock file, which names the holder's process and host.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be used as a run folder ({error.strerror}); choose another --out"
        ) from None
    with file:
        if not _take(file):
            raise UserError(
                f"{folder}: {_holder(file)} is training in this run folder; wait for it, stop it,"
                f" or choose another --out"
            )
        holder = json.dumps({"pid": os.getpid(), "host": platform.node()})
        with contextlib.suppress(OSError):  # on a full disk it holds without its text
            file.seek(0)
            file.truncate()
            os.write(file.fileno(), holder.encode())  # no buffer that closing would try to write
        yield


def _take(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_BEYOND_TEXT)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError) as error:
        logger.warning(
            "%s: this file system has no locks (%s); make sure no other trainer uses the folder",
            file.name,
            error,
        )
    return True


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        holder = json.load(file)
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
