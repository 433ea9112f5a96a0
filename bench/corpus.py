"""Text that every Python carries, for training a model that quantisation can be judged on.

    python -m gptopt.bench.corpus OUT

writes OUT/train.txt and OUT/held_out.txt: the standard library's sources (its tests left out) and
the language documentation of pydoc, every twentieth file held out.
"""

import argparse
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from gptopt.cli import in_one_line
from gptopt.log import say

HELD_OUT_EVERY = 20
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "pydoc_data"}


def library_texts() -> list[tuple[str, str]]:
    """(name, text) of every source file and documentation topic, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts)
    ]
    sources = [(name, path.read_text(encoding="utf-8", errors="replace")) for name, path in files]
    return sorted(sources + [(f"topic/{name}", text) for name, text in topics.items()])


def write_corpus(folder: Path) -> dict[str, int]:
    """Write train.txt and held_out.txt into `folder`; their sizes in characters."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for index, (_, text) in enumerate(library_texts()):
        parts["held_out" if index % HELD_OUT_EVERY == 0 else "train"].append(text)
    sizes = {}
    for name, texts in parts.items():
        whole = "\n\n".join(texts)
        (folder / f"{name}.txt").write_text(whole, encoding="utf-8")
        sizes[name] = len(whole)
    return sizes


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="the texts that Python carries, as two files")
    parser.add_argument("out", type=Path, help="folder for train.txt and held_out.txt")
    folder = parser.parse_args().out
    for name, size in write_corpus(folder).items():
        say(f"{folder / name}.txt: {size:,} characters")


if __name__ == "__main__":
    sys.exit(in_one_line(main))
