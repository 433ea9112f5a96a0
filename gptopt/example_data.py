"""Data for the worked examples of fine-tuning, out of what every CPython carries: no download.

`python -m gptopt.example_data FOLDER` writes text/ (documentation, to train on), questions.jsonl
(what a method does, for `finetune sft`) and packages.jsonl (which package some lines of source come
from, for `finetune classify`).
"""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptopt.log import say

TYPES = (str, bytes, list, dict, set, frozenset, int, float, complex, tuple, bytearray, memoryview)
MODULES = ("array", "collections", "datetime", "decimal", "fractions", "io", "os", "pathlib",
           "random", "re", "shutil", "socket", "statistics", "string", "subprocess", "threading",
           "time", "urllib.request", "zipfile", "logging", "math", "cmath", "operator")  # fmt: skip
PACKAGES = ("asyncio", "email", "http", "unittest")
_LINES = 4  # of source in one text
_LONGEST = 160  # characters of a reply


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every topic of Python's documentation."""
    from pydoc_data import topics

    yield from sorted(topics.topics.items())


def questions() -> Iterator[dict[str, str]]:
    """What a method or function does, and the first sentence of its documentation."""
    named: list[tuple[str, Any]] = [(kind.__name__, kind) for kind in TYPES]
    named += [(name, importlib.import_module(name)) for name in MODULES]
    for owner, holder in named:
        for name, value in sorted(vars(holder).items()):
            if name.startswith("_") or not callable(value):
                continue
            reply = _first_sentence(inspect.getdoc(value) or "")
            if reply:
                yield {"prompt": f"What does {owner}.{name} do?\n", "completion": reply}


def _first_sentence(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines()]
    # Built-ins may begin with their signature.
    lines = [line for line in lines if line and not re.match(r"[\w.]+\(.*\)( ->.*)?$", line)]
    found = re.match(r"[A-Z][^.]*[a-z]{2}[^.]*\.", " ".join(lines[:3]))
    return found[0] if found and len(found[0]) <= _LONGEST else None


def packages() -> Iterator[dict[str, str]]:
    """A few lines of source, and the package of the standard library that they come from."""
    for package in PACKAGES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(folder.glob("*.py")):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            for begin in range(0, len(lines) - _LINES, 3 * _LINES):
                yield {"text": "\n".join(lines[begin : begin + _LINES]), "label": package}


def write(folder: Path) -> None:
    """All of it."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for name, text in documents():
        (folder / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    for file, rows in (("questions.jsonl", questions()), ("packages.jsonl", packages())):
        _write_rows(folder / file, list(rows))
    say(f"{folder}: text, questions.jsonl, packages.jsonl")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
