"""From files of any kind to documents in bounded pieces; whatever is malformed is named exactly."""

import codecs
import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptopt.errors import UserError, first_line
from gptopt.manifest import sha256_of
from gptopt.tokenizer_files import reject_surrogates

TEXT_SUFFIXES = (".md", ".py", ".rst", ".text", ".txt")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
PIECE_CHARACTERS = 2**16
_READ_BYTES = 2**20
_MAX_LINE_BYTES = 2**28
_PARQUET_ROWS = 64
_LOOK_BACK = 4096  # characters searched for a place to cut
_BOM = "\ufeff"

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
        UserError: nothing there, a name that is no plain file, or a folder without such files.
    """

    def __init__(self, inputs: Iterable[str | Path], text_field: str = "text") -> None:
        self.text_field = text_field
        found = [path for name in inputs for path in _find(Path(name))]
        self.paths = list({path.resolve(): path for path in found}.values())
        if len(self.paths) < len(found):
            logger.warning("%d files were given twice and count once", len(found) - len(self.paths))
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
        if path.suffix.lower() in JSONL_SUFFIXES:
            yield from _jsonl_documents(path, self.text_field)
        elif path.suffix.lower() == PARQUET_SUFFIX:
            yield from _parquet_documents(path, self.text_field)
        else:
            yield str(path), _text_chunks(path)

    def fingerprints(self) -> list[dict[str, Any]]:
        """What each file holds, to tell later whether it is still the same."""
        return [_fingerprint(path) for path in self.paths]

    def has_fingerprints(self, stated: Any) -> bool:
        """Whether the files hold what `fingerprints` found. Only touched files are read again."""
        if not isinstance(stated, list) or len(stated) != len(self.paths):
            return False
        return all(map(_has_fingerprint, self.paths, stated))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the file"
        ) from None


def _fingerprint(path: Path) -> dict[str, Any]:
    with _reading(path):
        status = path.stat()
        return {
            "name": path.name,
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": sha256_of(path),
        }


def _has_fingerprint(path: Path, stated: dict[str, Any]) -> bool:
    with _reading(path):
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
    with _reading(path), path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            text, started = _decode(decoder, data, offset, path), offset > 0
            yield text if started else text.removeprefix(_BOM)
            offset += len(data)
        _decode(decoder, b"", offset, path)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, offset: int, path: Path) -> str:
    held = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error, offset - held) from None


def _not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> UserError:
    byte = error.object[error.start]
    return UserError(
        f"{where}: not UTF-8 at byte offset {offset + error.start} (0x{byte:02x}, {error.reason}); "
        f"convert the file to UTF-8, or leave it out"
    )


def _jsonl_documents(path: Path, field: str) -> Iterator[tuple[str, Iterable[str]]]:
    offset = 0
    with _reading(path), path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            where = f"{path} line {number}"
            if len(line) == _MAX_LINE_BYTES:
                raise UserError(f"{where}: longer than {_MAX_LINE_BYTES} bytes; split the record")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error, offset) from None
            text = text.removeprefix(_BOM) if number == 1 else text
            if text.strip():
                yield where, (_record_text(text, field, where),)
            offset += len(line)


def _record_text(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); mend or remove the line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)}); remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, found {type(record).__name__}")
    if field not in record:
        fields = ", ".join(sorted(record)[:10]) or "none"
        raise UserError(f"{where}: no field {field!r} (found: {fields}); choose with --text-field")
    return _checked_text(record[field], field, where)


def _checked_text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {field!r} is {type(value).__name__}, expected text; "
            f"choose another with --text-field"
        )
    try:
        reject_surrogates(value)
    except UserError as error:
        raise UserError(f"{where}: field {field!r}: {error}") from None
    return value


def _parquet_documents(path: Path, field: str) -> Iterator[tuple[str, Iterable[str]]]:
    try:
        import pyarrow  # an extra: only a parquet file needs it
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs pyarrow; run pip install 'gptopt[train]'"
        ) from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise UserError(
                    f"{path}: no column {field!r} (found: {', '.join(names[:10])}); "
                    f"choose with --text-field"
                )
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):  # one at a time: rows may be large
                    row += 1
                    where = f"{path} row {row}"
                    yield where, (_checked_text(value.as_py(), field, where),)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} after row {row}: column {field!r} is not UTF-8 ({error})"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} after row {row}: not readable as parquet ({first_line(error)}); "
            f"copy the file again"
        ) from None
