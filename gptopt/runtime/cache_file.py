"""A cache on disk: one safetensors file, checked from its header before its arrays are read.

Tensors: `ids` (B, S) int64, `mask` (B, S) uint8, and the graph's own names of the cache's inputs,
(B, K, S, D) each. The metadata names the sha256 of the ONNX file and data that made it: keys and
values mean nothing to another model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptopt.errors import CheckFailed, UserError, first_line

FORMAT = "gptopt-cache-1"
_NAMES = {"float32": "F32", "float16": "F16", "int8": "I8"}


class Saved(NamedTuple):
    """A cache as arrays: ids and mask (B, S) int64, and parts (B, K, S, D) in the graph's order."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    parts: list[npt.NDArray[Any]]


class Expected(NamedTuple):
    """What a cache must be to fit a model."""

    identity: str
    names: list[str]
    shape: tuple[int, int]  # K, D
    dtype: str  # numpy's name
    capacity: int
    vocab_size: int
    right: bool  # padding on the right only


def write(
    path: Path,
    identity: str,
    ids: npt.NDArray[np.int64],
    mask: npt.NDArray[np.int64],
    parts: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Write the file whole or not at all; UserError where it cannot be written."""
    from safetensors.numpy import save_file

    tensors = {"ids": ids, "mask": mask.astype(np.uint8), **parts}
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    staged = path.with_name(f"{path.name}.part")
    try:
        save_file(whole, staged, metadata={"format": FORMAT, "model": identity})
        staged.replace(path)
    except Exception as error:  # safetensors has its own for what the system refuses
        staged.unlink(missing_ok=True)
        raise UserError(f"{path}: the cache cannot be written ({first_line(error)})") from None


def read(path: Path, expected: Expected) -> Saved:
    """Read a cache that `write` wrote for the same model.

    Raises:
        UserError: there is no such file, or another model made it.
        CheckFailed: it is not what `write` writes.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; Cache.save writes one")
    try:
        with safe_open(path, framework="numpy") as file:
            _check_header(path, file, expected)
            ids, mask = file.get_tensor("ids"), file.get_tensor("mask").astype(np.int64)
            parts = [file.get_tensor(name) for name in expected.names]
    except (SafetensorError, OSError) as error:
        raise CheckFailed(f"{path}: is no saved cache ({first_line(error)})") from None
    _check_values(path, ids, mask, parts, expected)
    return Saved(ids, mask, parts)


def _check_header(path: Path, file: Any, expected: Expected) -> None:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckFailed(
            f"{path}: is no saved cache (format {metadata.get('format')!r}, expected {FORMAT!r})"
        )
    if metadata.get("model") != expected.identity:
        raise UserError(
            f"{path}: was saved by another model or precision; open the folder and precision that "
            f"saved it, or read the text again"
        )
    names = ["ids", "mask", *expected.names]
    if set(file.keys()) != set(names):
        raise CheckFailed(f"{path}: its arrays are not those of the model's cache")
    found = {name: file.get_slice(name) for name in names}
    B, S = [*found["ids"].get_shape(), 0, 0][:2]
    K, D = expected.shape
    wanted = {name: ([B, K, S, D], _NAMES[expected.dtype]) for name in expected.names}
    wanted |= {"ids": ([B, S], "I64"), "mask": ([B, S], "U8")}
    for name, (shape, dtype) in wanted.items():
        if (found[name].get_shape(), found[name].get_dtype()) != (shape, dtype):
            raise CheckFailed(
                f"{path}: {name} is {found[name].get_dtype()} {found[name].get_shape()}, expected "
                f"{dtype} {shape}"
            )
    if B < 1 or expected.capacity < S:
        raise CheckFailed(
            f"{path}: holds {B} rows of {S} columns, the model sees {expected.capacity}"
        )


def _check_values(
    path: Path,
    ids: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    parts: list[npt.NDArray[Any]],
    expected: Expected,
) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < expected.vocab_size):
        raise CheckFailed(f"{path}: holds ids that the model does not know")
    if not np.isin(mask, (0, 1)).all():
        raise CheckFailed(f"{path}: its mask is not of zeros and ones")
    if expected.right and (np.diff(mask, axis=1) > 0).any():
        raise CheckFailed(f"{path}: its rows are not padded on the right, as this model's are")
    if expected.dtype != "int8" and not all(np.isfinite(part).all() for part in parts):
        raise CheckFailed(f"{path}: holds keys or values that are not finite")
