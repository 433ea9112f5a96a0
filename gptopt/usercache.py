"""Small facts about this machine, kept between runs; a file that cannot be used is none.

They lie in $GPTOPT_CACHE_DIR, else $XDG_CACHE_HOME/gptopt, else ~/.cache/gptopt. (The kernels keep
their proofs there too, with code of their own: they import nothing from here.)
"""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Where the facts lie; it may not exist yet."""
    own = os.environ.get("GPTOPT_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptopt"


def recall(name: str) -> dict[str, Any] | None:
    """What was kept under a name such as "edge/threads.json"; None where nothing usable was."""
    path = folder() / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.info("%s is not used: %s", path, error)
        return None
    if not isinstance(found, dict):
        logger.info("%s is not used: it holds no JSON object", path)
        return None
    return found


def keep(name: str, value: dict[str, Any]) -> bool:
    """Keep a value under a name, all of it or nothing; whether it could be written."""
    path = folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(value, indent=1) + "\n")
            Path(part).replace(path)
        except OSError:
            Path(part).unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.info("%s is not kept: %s", path, error)
        return False
    return True
