"""From files of any kind to documents in bounded pieces; whatever is malformed is named exactly."""

import codecs
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptopt.data.records import (
    BOM,
    JSONL_SUFFIXES,
    PARQUET_SUFFIX,
    Record,
    checked_text,
    has_records,
    not_utf8,
    read_records,
    reading,
)
from gptopt.errors import UserError
from gptopt.manifest import sha256_of

TEXT_SUFFIXES = (".md", ".py", ".rst", ".text", ".txt")
PIECE_CHARACTERS = 2**16
_READ_BYTES = 2**20
_MOST_FILES = 200_000  # dataset.json names each, and is read whole
_LOOK_BACK = 4096  # characters searched for a place to cut

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document that is small enough to be tokenised at once."""

    document: int  # counted over all sources, empty documents left out
    text: str
    offset: int  # characters of the document before this piece
    path: Path
    where: str  # file, and line or row, for messages


class Corpus:
    """The documents of some files: a text file is one, a line of jsonl or a row of parquet is one.

    Folders are searched recursively, in sorted order, without hidden names and links to folders,
    for TEXT_SUFFIXES, JSONL_SUFFIXES and PARQUET_SUFFIX. A file given by name is always taken; it
    is text unless its suffix says jsonl or parquet. Text is UTF-8; a byte order mark at its start
    is dropped, line ends and NUL are kept.

    Raises:
        UserError: nothing there, a name that is no plain file, a folder without such files, or more
            files than a data folder can list.
    """

    def __init__(self, inputs: Iterable[str | Path], text_field: str = "text") -> None:
        self.text_field = text_field
        found = [path for name in inputs for path in _find(Path(name))]
        self.paths = list({path.resolve(): path for path in found}.values())
        if len(self.paths) < len(found):
            logger.warning("%d files were given twice and count once", len(found) - len(self.paths))
        if len(self.paths) > _MOST_FILES:
            raise UserError(
                f"{self.paths[0].parent}: {len(self.paths):,} files, at most {_MOST_FILES:,} can be"
                f" listed; put their texts into fewer files, as lines of jsonl"
            )
        self.bytes = sum(path.stat().st_size for path in self.paths)

    def pieces(self, limit: int = PIECE_CHARACTERS) -> Iterator[Piece]:
        """Every document in order, in pieces of at most `limit` characters, cut before a space."""
        document = -1
        for path in self.paths:
            for where, chunks in self._documents(path):
                offset = 0
                for text in cut(chunks, limit):
                    document += offset == 0
                    yield Piece(document, text, offset, path, where)
                    offset += len(text)

    def _documents(self, path: Path) -> Iterator[tuple[str, Iterable[str]]]:
        if not has_records(path):
            yield str(path), _text_chunks(path)
            return
        for where, record in read_records(path, [self.text_field]):
            yield where, (_field_text(record, self.text_field, where),)

    def fingerprints(self) -> list[dict[str, Any]]:
        """What each file holds, to tell later whether it is still the same."""
        return [_fingerprint(path) for path in self.paths]

    def has_fingerprints(self, stated: Any) -> bool:
        """Whether the files hold what `fingerprints` found. Only touched files are read again."""
        if not isinstance(stated, list) or len(stated) != len(self.paths):
            return False
        return all(map(_has_fingerprint, self.paths, stated))


def _fingerprint(path: Path) -> dict[str, Any]:
    with reading(path):
        status = path.stat()
        return {
            "name": path.name,
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": sha256_of(path),
        }


def _has_fingerprint(path: Path, stated: dict[str, Any]) -> bool:
    with reading(path):
        status = path.stat()
        if status.st_size != stated.get("bytes"):
            return False
        times = path.name, status.st_mtime_ns
        if times == (stated.get("name"), stated.get("mtime_ns")):
            return True
        return sha256_of(path) == stated.get("sha256")


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        what = "is not a plain file" if path.exists() else "no such file or folder"
        raise UserError(f"{path}: {what}; give text, jsonl or parquet files, or folders of them")
    suffixes = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX)
    found, skipped = [], 0
    for root, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(root) / name
            if name.startswith(".") or not file.is_file():
                continue
            if file.suffix.lower() in suffixes:
                found.append(file)
            else:
                skipped += 1
    if not found:
        raise UserError(
            f"{path}: holds no file with one of the suffixes {' '.join(suffixes)}; "
            f"give files by name to have them read as text"
        )
    if skipped:
        logger.info("%s: skipped %d files that have other suffixes than text", path, skipped)
    return found


def cut(chunks: Iterable[str], limit: int) -> Iterator[str]:
    """The same text in pieces of at most `limit` characters, wherever the chunks end.

    A piece ends between a letter or digit and white space, because no pre-tokeniser's match spans
    that place: the pieces encode to the ids of the whole. Text that has no such place near the
    limit is cut at the limit.
    """
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > limit:
            end = _cutting_place(rest, start, start + limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _cutting_place(text: str, start: int, end: int) -> int:
    for place in range(end, max(start, end - _LOOK_BACK), -1):
        if text[place] in " \n\r\t" and text[place - 1].isalnum():
            return place
    return end


def _text_chunks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
    with reading(path), path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            text, started = _decode(decoder, data, offset, path), offset > 0
            yield text if started else text.removeprefix(BOM)
            offset += len(data)
        _decode(decoder, b"", offset, path)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, offset: int, path: Path) -> str:
    held = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), error, offset - held) from None


def _field_text(record: Record, field: str, where: str) -> str:
    if field not in record:
        fields = ", ".join(sorted(record)[:10]) or "none"
        raise UserError(f"{where}: no field {field!r} (found: {fields}); choose with --text-field")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {field!r} is {type(value).__name__}, expected text; "
            f"choose another with --text-field"
        )
    return checked_text(value, field, where)
