"""Records of jsonl and parquet files; whatever is malformed is named with its line or row."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptopt.errors import UserError, first_line
from gptopt.tokenizer_files import reject_surrogates

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
BOM = "\ufeff"
_MAX_LINE_BYTES = 2**28
_PARQUET_ROWS = 64

Record = dict[str, Any]


def has_records(path: Path) -> bool:
    """Whether a file's name says that it holds records."""
    return path.suffix.lower() in (*JSONL_SUFFIXES, PARQUET_SUFFIX)


def read_records(
    path: Path, fields: Sequence[str] = (), option: str = "--text-field"
) -> Iterator[tuple[str, Record]]:
    """Each record of a file with its place, such as "a.jsonl line 7", for messages.

    Args:
        path: a jsonl or parquet file.
        fields: of parquet, the only columns to read (none of them there is an error); none: all.
        option: by which a user names such a field.

    Raises:
        UserError: the file cannot be read, or a line or row is malformed.
    """
    if path.suffix.lower() == PARQUET_SUFFIX:
        return _parquet_records(path, fields, option)
    return _jsonl_records(path)


def checked_text(value: str, field: str, where: str) -> str:
    """The value, which must be text that can be encoded."""
    try:
        reject_surrogates(value)
    except UserError as error:
        raise UserError(f"{where}: field {field!r}: {error}") from None
    return value


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the file"
        ) from None


def not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> UserError:
    """The error for a piece of a file that begins at byte `offset`."""
    byte = error.object[error.start]
    return UserError(
        f"{where}: not UTF-8 at byte offset {offset + error.start} (0x{byte:02x}, {error.reason}); "
        f"convert the file to UTF-8, or leave it out"
    )


def _jsonl_records(path: Path) -> Iterator[tuple[str, Record]]:
    offset = 0
    with reading(path), path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            where = f"{path} line {number}"
            if len(line) == _MAX_LINE_BYTES:
                raise UserError(f"{where}: longer than {_MAX_LINE_BYTES} bytes; split the record")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(where, error, offset) from None
            text = text.removeprefix(BOM) if number == 1 else text
            if text.strip():
                yield where, _record(text, where)
            offset += len(line)


def _record(line: str, where: str) -> Record:
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
    return record


def _parquet_records(
    path: Path, fields: Sequence[str], option: str
) -> Iterator[tuple[str, Record]]:
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
            columns = [name for name in fields or names if name in names]
            if not columns:
                raise UserError(
                    f"{path}: no column {' or '.join(map(repr, fields))} "
                    f"(found: {', '.join(names[:10])}); choose with {option}"
                )
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for index in range(len(batch)):  # one at a time: rows may be large
                    row += 1
                    values = {name: batch.column(name)[index].as_py() for name in columns}
                    yield f"{path} row {row}", values
    except UnicodeDecodeError as error:
        raise UserError(f"{path} after row {row}: a column is not UTF-8 ({error})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} after row {row}: not readable as parquet ({first_line(error)}); "
            f"copy the file again"
        ) from None
