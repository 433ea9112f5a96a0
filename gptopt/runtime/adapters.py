"""LoRA adapters of an exported folder: one graph, whose low-rank inputs are switched at run time.

A graph that can carry adapters has for each adapted layer two optional inputs, `<layer>.lora_A`
(in, rank) and `<layer>.lora_B` (rank, out), whose default has rank 0 and adds nothing. An adapter
is a file of onnxruntime's own format, which its other clients read too; config.json names them.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptopt.errors import CheckFailed, UserError, first_line
from gptopt.manifest import MANIFEST, read_json, verify_file

SUFFIXES = (".lora_A", ".lora_B")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_MOST_BYTES = 2**31  # flatbuffers end there

Matrices = dict[str, npt.NDArray[Any]]


def adapter_file(name: str, dtype: str) -> str:
    """Where an adapter lies in the folder, for files that compute in a type of float."""
    return f"onnx/{name}{'_fp16' if dtype == 'float16' else ''}.onnx_adapter"


def adapter_names(folder: Path) -> list[str]:
    """The adapters that a folder carries, in the order in which they were exported.

    Raises:
        UserError: config.json is missing or malformed.
        CheckFailed: a name in it is none that an export gives.
    """
    path = folder / "config.json"
    told = read_json(path).get("gptopt_edge")
    names = told.get("adapters", []) if isinstance(told, dict) else []
    if not isinstance(names, list) or not all(
        isinstance(name, str) and NAME.fullmatch(name) for name in names
    ):
        raise CheckFailed(f"{path}: gptopt_edge.adapters is {names!r}; export the model again")
    return names


def read_adapter(folder: Path, name: str, slots: "Slots", *, verify: bool = True) -> Matrices:
    """The matrices of one of a folder's adapters, held to the graph's own sizes.

    Raises:
        UserError: the folder carries no such adapter.
        CheckFailed: its file was changed, or does not fit the graph.
    """
    known = adapter_names(folder)
    if name not in known:
        found = f"it has {', '.join(known)}" if known else "it was exported without any"
        raise UserError(f"{folder}: has no adapter {name!r}; {found}")
    file = adapter_file(name, slots.dtype)
    if verify:
        listed = read_json(folder / MANIFEST).get("files")
        entry = listed.get(file) if isinstance(listed, dict) else None
        verify_file(folder, file, entry)  # its sha256, before anything parses it
    return read_matrices(folder / file, slots)


def read_matrices(path: Path, slots: "Slots") -> Matrices:
    """Read a file of onnxruntime's adapter format; nothing in it is believed before it is compared.

    Raises:
        CheckFailed: it is no such file, or not of this graph.
    """
    import onnxruntime

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckFailed(f"{path}: has {path.stat().st_size} bytes; export the model again")
        # onnxruntime verifies the buffer and compares each size with its bytes.
        values = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckFailed(
            f"{path}: onnxruntime refuses it ({first_line(error)[:300]}); export the model again"
        ) from None
    matrices = {}
    for key, value in values.items():
        if value.element_type() not in (1, 10):  # of onnx.proto: float, float16
            raise CheckFailed(f"{path}: {key[:200]!r} is no matrix of floats; export it again")
        matrices[key] = value.numpy().copy()  # the value is a view of the file
    slots.check(matrices, path)
    return matrices


class Slots:
    """The low-rank inputs of a graph.

    Attributes:
        dtype: "float32" or "float16".
        sizes: layer -> (in, out).
    """

    def __init__(self, optional: Mapping[str, Any]) -> None:
        """From the optional inputs of a session, by name."""
        self.dtype = "float32"
        self.sizes: dict[str, tuple[int, int]] = {}
        for name, item in optional.items():
            if name.endswith(SUFFIXES[0]) and name[:-7] + SUFFIXES[1] in optional:
                out = optional[name[:-7] + SUFFIXES[1]]
                self.sizes[name[:-7]] = (item.shape[0], out.shape[1])
                self.dtype = _DTYPES.get(item.type, item.type)

    def __bool__(self) -> bool:
        return bool(self.sizes)

    def check(self, matrices: Matrices, where: Path | str) -> None:
        """Raise CheckFailed where matrices are not pairs of this graph's sizes."""
        layers = {name.rpartition(".")[0] for name in matrices}
        for layer in sorted(layers):
            a, b = (matrices.get(layer + suffix) for suffix in SUFFIXES)
            wide, tall = self.sizes.get(layer, (0, 0))
            if layer not in self.sizes or a is None or b is None:
                raise CheckFailed(
                    f"{where}: {layer[:200]!r} has no place in the graph, or lacks one of its two "
                    f"matrices; export the model again"
                )
            rank = a.shape[-1] if a.ndim else 0
            for matrix, shape in ((a, (wide, rank)), (b, (rank, tall))):
                if matrix.shape != shape or matrix.dtype != self.dtype:
                    raise CheckFailed(
                        f"{where}: {layer} has a matrix {matrix.dtype} {list(matrix.shape)}, the "
                        f"graph asks for {self.dtype} {list(shape)}; export the model again"
                    )
                if not np.isfinite(matrix).all():
                    raise CheckFailed(f"{where}: {layer} holds what is not finite; export it again")
        if extra := [name for name in matrices if not name.endswith(SUFFIXES)]:
            raise CheckFailed(f"{where}: {extra[0][:200]!r} is no adapter's; export it again")

    def filled(self, matrices: Matrices) -> Matrices:
        """A value for every input: what is not given has rank 0, which adds nothing."""
        whole: Matrices = {}
        for layer, (wide, tall) in self.sizes.items():
            for suffix, shape in zip(SUFFIXES, ((wide, 0), (0, tall)), strict=True):
                given = matrices.get(layer + suffix)
                whole[layer + suffix] = np.zeros(shape, self.dtype) if given is None else given
        return whole


def parameters(matrices: Matrices) -> int:
    """How many numbers an adapter has."""
    return sum(math.prod(matrix.shape) for matrix in matrices.values())
