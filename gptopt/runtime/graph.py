"""What an ONNX file makes a runtime read besides itself, found without the onnx package.

onnxruntime opens whatever path a tensor's external data names, hard links included, so the file is
walked before a session sees it: only `<file>_data` beside it may be named, within its size. Graphs
inside of nodes and functions are refused, for a few nested ones unfold into billions of nodes. The
walk follows the fields of onnx.proto that can lead to a tensor and skips every other by its length.
Source: protobuf encoding guide (wire format); onnx.proto (field numbers), fixed by a test.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gptopt.errors import CheckFailed

# message -> field number -> message. FORBIDDEN ones have no place in an exported folder.
FORBIDDEN = {"FunctionProto", "SparseTensorProto", "TrainingInfoProto"}
CHILDREN: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
}
_OP_TYPE, _DOMAIN = 4, 7  # NodeProto.op_type, .domain
_DOMAINS = (b"", b"ai.onnx", b"com.microsoft")
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # TensorProto.external_data, .data_location
_KEY, _VALUE = 1, 2  # StringStringEntryProto
_MAX_DEPTH = 90  # protobuf itself stops at 100
_MAX_FIELDS = 4_000_000  # GPT-2 has some 10^4: a file of endless tiny fields must not hold us up
_KNOWN_KEYS = {"location", "offset", "length", "checksum"}

Span = tuple[int, int]


class _Field(NamedTuple):
    number: int
    wire: int
    value: int  # of a varint
    span: Span  # of a length-delimited field


def check_graph(path: Path) -> None:
    """Refuse an ONNX file that would read any other file than `<its name>_data` beside it.

    Raises:
        CheckFailed: the file is no ONNX, its tensors lie elsewhere or outside the data file, or it
            holds what no exported folder holds: sparse tensors, training graphs, functions, graphs
            inside of nodes, operators of unknown domains, EPContext nodes.
    """
    data = path.with_name(path.name + "_data")
    data_bytes = data.stat().st_size if data.is_file() else 0
    if path.stat().st_size == 0:
        raise CheckFailed(f"{path}: is empty; copy the folder again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            check_content(content, data.name, data_bytes)
        except Refused as error:
            raise CheckFailed(f"{path}: {error}; export the model again") from None


class Refused(ValueError):
    """What is wrong with a graph, without the name of its file."""


def check_content(content: bytes | mmap.mmap, data_name: str, data_bytes: int) -> None:
    """Raise Refused where the graph may read anything but `data_bytes` bytes of `data_name`."""
    walk = _Walk(content)
    for tensor in walk.tensors():
        _check_external(walk.external_data(tensor), data_name, data_bytes)


class _Walk:
    """Reads protobuf fields out of bytes that are not trusted: no recursion, a bounded count."""

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self._content = content
        self._fields_left = _MAX_FIELDS

    def tensors(self) -> Iterator[Span]:
        """The span of every TensorProto, wherever it hides."""
        stack: list[tuple[str, Span, int]] = [("ModelProto", (0, len(self._content)), 0)]
        while stack:
            message, span, depth = stack.pop()
            if message in FORBIDDEN:
                raise Refused(f"holds a {message}, which no exported folder needs")
            if depth > _MAX_DEPTH:
                raise Refused(f"is nested more than {_MAX_DEPTH} messages deep")
            if message == "GraphProto" and depth > 1:
                raise Refused("holds a graph inside a node, which no exported folder needs")
            if message == "TensorProto":
                yield span
                continue
            for field in self.fields(span):
                if field.number in CHILDREN[message]:
                    child = CHILDREN[message][field.number]
                    stack.append((child, self._message(field), depth + 1))
                elif message == "NodeProto":
                    self._check_operator(field)

    def _check_operator(self, field: _Field) -> None:
        if field.number == _OP_TYPE and self._bytes(field) == b"EPContext":
            raise Refused("holds an EPContext node, which loads a compiled binary")
        if field.number == _DOMAIN and (domain := self._bytes(field)) not in _DOMAINS:
            raise Refused(f"holds an operator of the unknown domain {_shown(domain)}")

    def external_data(self, tensor: Span) -> dict[str, str] | None:
        """The external-data entries of a tensor; None where its data lies in the file itself."""
        entries: dict[str, str] = {}
        external = False
        for field in self.fields(tensor):
            if field.number == _DATA_LOCATION and field.value:
                external = True
            if field.number == _EXTERNAL_DATA:
                external = True
                parts = {part.number: part for part in self.fields(self._message(field))}
                key, value = (
                    self._bytes(parts[n]).decode("utf-8", "replace") if n in parts else ""
                    for n in (_KEY, _VALUE)
                )
                if key not in _KNOWN_KEYS or key in entries:
                    raise Refused(
                        f"a tensor's external data has an unknown or second key {key[:80]!r}"
                    )
                entries[key] = value
        return entries if external else None

    def fields(self, span: Span) -> Iterator[_Field]:
        """Every field of the message that lies in a span."""
        position, end = span
        while position < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise Refused(f"holds more than {_MAX_FIELDS} fields")
            tag, position = self._varint(position, end)
            number, wire = tag >> 3, tag & 7
            value, start = 0, position
            if wire == 0:
                value, position = self._varint(position, end)
            elif wire == 2:
                length, start = self._varint(position, end)
                position = start + length
            elif wire in (1, 5):
                position += 8 if wire == 1 else 4
            else:
                raise Refused(f"is no ONNX file (wire type {wire} at byte {position})")
            if number == 0 or position > end:
                raise Refused(f"is no ONNX file, or is cut off (at byte {start})")
            yield _Field(number, wire, value, (start, position))

    def _message(self, field: _Field) -> Span:
        if field.wire != 2:
            raise Refused(f"is no ONNX file (wire type {field.wire} at byte {field.span[0]})")
        return field.span

    def _bytes(self, field: _Field) -> bytes:
        start, end = self._message(field)
        return self._content[start : min(end, start + 4096)]  # names, not data

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 70:
            byte = self._content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise Refused(f"is no ONNX file, or is cut off (at byte {position})")


def _shown(name: bytes) -> str:
    return repr(name[:80].decode("utf-8", "replace"))


def _check_external(entries: dict[str, str] | None, data_name: str, data_bytes: int) -> None:
    if entries is None:
        return
    location = entries.get("location", "")
    if location != data_name:
        raise Refused(f"a tensor's data lies in {location[:200]!r}; only {data_name!r} is allowed")
    end = _count(entries, "offset") + _count(entries, "length")
    if end > data_bytes:
        raise Refused(f"a tensor's data ends at byte {end}, {data_name} has {data_bytes}")


def _count(entries: dict[str, str], key: str) -> int:
    text = entries.get(key, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Refused(f"a tensor's external data has the {key} {text[:40]!r}")
    return int(text)
