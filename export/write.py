"""Writing a graph: one ONNX file, its weights inside it or beside it in `<file>_data`.

Outside, equal bytes are stored once: two initializers of different shapes may point at one place,
which is how a tied head and its embedding share their codes. Tensors are written one by one, so
that no more than one of them is held beside what the graph holds already.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from gptopt.errors import UserError, first_line

logger = logging.getLogger(__name__)

# Shapes, axes and single numbers stay in the graph: runtimes read them before they load weights.
_INLINE_BYTES = 1024
_WORTH_A_FILE = 2**20  # a data file stores shared bytes once, a graph twice
# Kernels read whole cache lines, and large tensors are mapped into memory page by page.
_LINE, _PAGE, _LARGE = 64, 4096, 2**20
_PROTOBUF_LIMIT = 2**31 - 1
_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: bytes of the graph and of the data file, and bytes that sharing saved."""

    graph_bytes: int
    data_bytes: int
    shared_bytes: int


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights, as if each were stored for itself."""
    return sum(tensor.nbytes for _, tensor in _weights(model))


def shared_bytes(model: ir.Model) -> int:
    """Bytes that `save` would store once instead of twice in a data file.

    Only memory that initializers share is counted (views of one array), as the stages leave it.
    """
    seen: set[tuple[int, int]] = set()
    shared = 0
    for _, tensor in _weights(model):
        if not isinstance(tensor, ir.Tensor) or tensor.nbytes < _INLINE_BYTES:
            continue
        array = tensor.numpy()
        place = (array.__array_interface__["data"][0], array.nbytes)
        shared += array.nbytes if place in seen else 0
        seen.add(place)
    return shared


def wants_data_file(model: ir.Model, limit_bytes: int) -> bool:
    """Whether weights belong beside the graph: they exceed the limit, or share a MiB or more."""
    return weight_bytes(model) > limit_bytes or shared_bytes(model) >= _WORTH_A_FILE


def save(model: ir.Model, path: Path, *, external: bool) -> Written:
    """Write a graph to `path`, and with `external` its larger weights to `<path>_data`.

    The model is not changed. Existing files of these names are replaced.

    Raises:
        UserError: the weights do not fit into one ONNX file, or the disk is full or read-only;
            what was written is removed.
    """
    data = path.with_name(f"{path.name}_data")
    held = dict(_weights(model))
    try:
        if not external:
            data.unlink(missing_ok=True)
            return Written(_write_graph(model, path), 0, 0)
        with data.open("wb") as file:
            writer = _DataFile(file, data)
            for value, tensor in held.items():
                if tensor.nbytes >= _INLINE_BYTES and tensor.dtype != ir.DataType.INT64:
                    value.const_value = writer.write(tensor, value.name or "")
        return Written(_write_graph(model, path), writer.end, writer.shared)
    except OSError as error:
        path.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror or first_line(error)}); free some space "
            f"or choose another folder"
        ) from error
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


class _DataFile:
    """A file of tensors, each at an aligned offset, equal bytes at one."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._places: dict[bytes, int] = {}
        self.end = 0
        self.shared = 0

    def write(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """Store a tensor's bytes, unless they are there already; where they lie."""
        content = tensor.tobytes()
        key = hashlib.sha256(content).digest()
        if key in self._places:
            self.shared += len(content)
        else:
            self._places[key] = self._append(content)
        return ir.ExternalTensor(
            self._path.name,
            self._places[key],
            len(content),
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self._path.parent,
        )

    def _append(self, content: bytes) -> int:
        step = _PAGE if len(content) >= _LARGE else _LINE
        offset = -(-self.end // step) * step
        self._file.write(bytes(offset - self.end))
        self._file.write(content)
        self.end = offset + len(content)
        return offset


def _weights(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value


def _write_graph(model: ir.Model, path: Path) -> int:
    """Write the graph's file, the weights that are not beside it one after another.

    A message of protobuf is its fields in any order, each behind its tag and, where it is a message
    itself, its length. So weights may follow the rest of the graph as they are made.
    """
    inside = {
        value.name or "": (value, tensor)
        for value, tensor in _weights(model)
        if tensor.nbytes >= _INLINE_BYTES and not isinstance(tensor, ir.ExternalTensor)
    }
    size = sum(tensor.nbytes for _, tensor in inside.values())
    if size > _PROTOBUF_LIMIT:
        raise UserError(
            f"{path}: {size:,} bytes of weights do not fit into one ONNX file, which ends at "
            f"{_PROTOBUF_LIMIT:,}; write them beside it"
        )
    for name, (value, tensor) in inside.items():
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor("", 0, 0, tensor.dtype, shape=shape, name=name)
    proto: onnx.ModelProto = ir.to_proto(model)
    heads = {each.name: _head(each) for each in proto.graph.initializer if each.name in inside}
    kept = [each for each in proto.graph.initializer if each.name not in inside]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    parts = [
        (heads[name] + _field(_RAW_DATA, tensor.nbytes), tensor)
        for name, (_, tensor) in inside.items()
    ]
    starts = [_field(_INITIALIZER, len(head) + tensor.nbytes) + head for head, tensor in parts]
    length = len(graph) + size + sum(map(len, starts))
    with path.open("wb") as file:
        file.write(proto.SerializeToString() + _field(_GRAPH, length) + graph)
        for start, (_, tensor) in zip(starts, parts, strict=True):
            file.write(start)
            file.write(tensor.tobytes())
        return file.tell()


def _head(tensor: onnx.TensorProto) -> bytes:
    """What stands in front of a tensor's bytes: its name, type and sizes."""
    for field in ("external_data", "data_location"):
        tensor.ClearField(field)
    content: bytes = tensor.SerializeToString()
    return content


def _field(number: int, length: int) -> bytes:
    """The tag of a field of bytes, and their number."""
    found = bytearray([number << 3 | 2])
    while length > 0x7F:
        found.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*found, length])
