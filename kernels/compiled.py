"""What the kernels cost once compiled, as data that needs no compiler to be read.

The table has a row for each case, architecture and shipped configuration; the summary, which is
part of the package, says the most that each kernel needs on each architecture. `make aot` writes
both:

    gptopt doctor --kernels --compile-only --output bench/results/aot.json
    python -m gptopt.kernels.compiled bench/results/aot.json
"""

import ast
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
SUMMARY = _FOLDER / "compiled.json"


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    registers: for each thread. spill_bytes: for each thread, in local memory. shared_bytes: for
    each block. matrix: the matrix instruction in use, "" where there is none. problem: what keeps
    this kernel from being shipped, "" where nothing does.
    """

    operator: str
    kernel: str
    label: str
    arch: str
    num_warps: int
    num_stages: int
    sizes: dict[str, int]
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    matrix: str = ""
    problem: str = ""

    @property
    def package(self) -> str:
        """The package of the kernel: attention has attention_decode's too."""
        return self.operator.removesuffix("_decode")


@dataclass(frozen=True)
class Table:
    """triton: the version that compiled it. sources: by architecture and package, see `sources`."""

    triton: str
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def updated(self, rows: Iterable[Row]) -> "Table":
        """With `rows` for all that it had of their architectures and packages."""
        rows = tuple(rows)
        parts = {(row.arch, row.package) for row in rows}
        kept = [row for row in self.rows if (row.arch, row.package) not in parts]
        known = {arch: dict(packages) for arch, packages in self.sources.items()}
        for arch, package in sorted(parts):
            known.setdefault(arch, {})[package] = sources(package)
        ordered = sorted([*kept, *rows], key=lambda row: (row.package, row.arch))
        return Table(self.triton, known, tuple(ordered))

    def current(self) -> dict[tuple[str, str, str], Row]:
        """The rows of the sources as they are now, by kernel, label and architecture."""
        return {
            (row.kernel, row.label, row.arch): row
            for row in self.rows
            if self.sources[row.arch][row.package] == sources(row.package)
        }


@functools.cache
def sources(package: str) -> str:
    """What the kernels of a package are compiled from, as 12 hexadecimal digits.

    That is the text of the @jit functions and their constants; the rest of a module may change.
    """
    digest = hashlib.sha256()
    for path in (*sorted((_FOLDER / package).glob("triton*.py")), _FOLDER / "launch.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            found = ast.get_source_segment(text, node) or ""
            if isinstance(node, ast.FunctionDef):
                decorators = map(ast.unparse, node.decorator_list)
                compiled = any(re.search(r"\bjit\b", decorator) for decorator in decorators)
            else:
                compiled = "tl.constexpr(" in found
            digest.update(found.encode() if compiled else b"")
    return digest.hexdigest()[:12]


def configs() -> str:
    """The shipped configurations, as 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted((_FOLDER / "configs").glob("*.json")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def read(path: Path) -> Table:
    """A table that `write` wrote.

    Raises:
        ValueError: the file is not one.
        OSError: it cannot be read.
    """
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(**dict(zip(text["columns"], row, strict=True))) for row in text["rows"])
        return Table(text["triton"], text["sources"], rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a table of compiled kernels ({error})") from None


def write(path: Path, table: Table) -> None:
    """Write a table, a line for each row, all of it or nothing."""
    head = {
        "triton": table.triton,
        "sources": table.sources,
        "columns": [column.name for column in fields(Row)],
    }
    start = json.dumps(head, indent=1).removesuffix("\n}")
    rows = ",\n".join(json.dumps(list(asdict(row).values())) for row in table.rows)
    _replace(path, f'{start},\n "rows": [\n{rows}\n]}}\n')


def summarise(table: Table) -> dict[str, Any]:
    """By architecture and kernel, the number of cases and the most that any of them needs."""
    archs: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        kernels = archs.setdefault(row.arch, {})
        known = kernels.setdefault(row.kernel, dict.fromkeys(_MOST, 0) | {"matrix": []})
        known["cases"] += 1
        known["problems"] += bool(row.problem)
        for name in ("registers", "spill_bytes", "shared_bytes"):
            known[name] = max(known[name], getattr(row, name))
        if row.matrix and row.matrix not in known["matrix"]:
            known["matrix"] = sorted([*known["matrix"], row.matrix])
    return {
        "triton": table.triton,
        "sources": table.sources,
        "configs": configs(),
        "archs": archs,
    }


_MOST = ("cases", "problems", "registers", "spill_bytes", "shared_bytes")


def shipped() -> dict[str, Any]:
    """The summary that is part of the package."""
    summary: dict[str, Any] = json.loads(SUMMARY.read_text(encoding="utf-8"))
    return summary


def is_current(summary: Mapping[str, Any], triton: str | None) -> bool:
    """Whether a summary is of the installed triton, these sources and these configurations."""
    return (summary["triton"], summary["configs"]) == (triton, configs()) and all(
        known == sources(package)
        for packages in summary["sources"].values()
        for package, known in packages.items()
    )


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


if __name__ == "__main__":
    _replace(SUMMARY, json.dumps(summarise(read(Path(sys.argv[1]))), indent=1) + "\n")
