"""Tensors that ranks hold in parts, on the disk: torch.distributed.checkpoint over safetensors.

Each rank's parts are one safetensors file; a JSON index says of every tensor what shape it has and
which file holds which part. That is all: torch's own storage pickles, this one cannot. Whoever
reads takes the regions it needs, on any number of ranks.
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from gptopt.errors import CheckFailed, first_line
from gptopt.manifest import read_json
from gptopt.training.distributed import Group
from gptopt.training.saving import INDEX

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Place(NamedTuple):
    """Where a part of a tensor lies."""

    file: str
    key: str


class ShardWriter(StorageWriter):
    """Collects what this rank has to write; putting it on the disk is the caller's, at any time.

    Args:
        name: of the file they stand for: x.safetensors is x-00001-of-00002.safetensors and so on.
        host: makes the copy of a tensor, under its key, that outlives the next step.

    Attributes:
        file, tensors: what this rank is to write.
        index: the JSON index, on rank 0.
    """

    def __init__(self, name: str, host: Any) -> None:
        self._name, self._host = name, host
        self.file = ""
        self.tensors: dict[str, Tensor] = {}
        self.index: dict[str, Any] | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from an earlier save."""
        self.tensors, self.index = {}, None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: no file is opened."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """What the planner chose is written as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank its file."""
        stem, count = Path(self._name).stem, len(plans)
        names = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        return [
            dataclasses.replace(plan, storage_data=name)
            for plan, name in zip(plans, names, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy this rank's parts to the host."""
        self.file = plan.storage_data
        results = []
        for item in plan.items:
            data = planner.resolve_data(item)
            if not isinstance(data, Tensor):
                raise TypeError(f"{item.index.fqn}: only tensors can be written, no objects")
            key = _key(item.index.fqn, item.index.offset or ())
            self.tensors[key] = self._host(f"{self.file}/{key}", data.detach())
            results.append(WriteResult(item.index, data.nbytes, Place(self.file, key)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Compose the index."""
        places = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data
                  for part in results for r in part}  # fmt: skip
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            parts = []
            for chunk in entry.chunks:
                place = places.get((name, tuple(chunk.offsets))) or places[name, ()]
                parts.append(
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": place.file,
                        "key": place.key,
                    }
                )
            dtype = _NAMES[entry.properties.dtype]
            tensors[name] = {"dtype": dtype, "shape": list(entry.size), "parts": parts}
        self.index = {"format": 1, "tensors": tensors}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by a path alone."""
        return False


class ShardReader(StorageReader):
    """Reads what ShardWriter collected, or one plain safetensors file, as if sharded over one rank.

    Args:
        folder: verified by its manifest before.
        name: of the file, whole or in parts.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._table = _table(folder, name)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every tensor that is there."""
        return {name: torch.Size(entry["shape"]) for name, entry in self._table.items()}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from an earlier load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as torch wants it."""
        tensors: dict[str, STORAGE_TYPES] = {}
        places = {}
        for name, entry in self._table.items():
            chunks = []
            for part in entry["parts"]:
                offsets = torch.Size(part["offsets"])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(part["sizes"])))
                places[MetadataIndex(name, offsets)] = Place(part["file"], part["key"])
            properties = TensorProperties(dtype=_DTYPES[entry["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Keep where the parts lie."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """What the planner chose is read as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Ranks read on their own."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the regions that this rank holds, and no others, from the files."""
        for item in plan.items:
            place = self._places[item.storage_index]
            with safe_open(self._folder / place.file, framework="pt") as file:
                stored = file.get_slice(place.key)
                region = tuple(
                    slice(begin, begin + length)
                    for begin, length in zip(item.storage_offsets, item.lengths, strict=True)
                )
                value = stored[region] if region else file.get_tensor(place.key)
            target = planner.resolve_tensor(item).detach()
            target.copy_(value)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by a path alone."""
        return False


def save_sharded(writer: ShardWriter, tensors: dict[str, Tensor], group: Group) -> None:
    """Let every rank's writer collect its parts; all ranks must call it."""
    save(tensors, storage_writer=writer, process_group=group.process_group)


def load_sharded(reader: ShardReader, tensors: dict[str, Tensor], group: Group) -> None:
    """Fill the tensors, whole ones or this rank's parts of them; all ranks must call it."""
    alone = group.process_group is None
    with warnings.catch_warnings():
        # It tells what was asked for: that one process reads alone.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(tensors, storage_reader=reader, process_group=group.process_group, no_dist=alone)
        except CheckpointException as error:  # a BaseException that holds each rank's own
            reason = next(iter(error.failures.values()))[0]
            raise ValueError(first_line(reason)) from None


def _key(name: str, offsets: Sequence[int]) -> str:
    """Under which a part lies in its file, which may hold several of one tensor."""
    return name if not any(offsets) else f"{name}@{','.join(map(str, offsets))}"


def _table(folder: Path, name: str) -> dict[str, Any]:
    """For every tensor dtype, shape and parts."""
    index, plain = folder / f"{name}{INDEX}", folder / name
    if not index.is_file():
        return dict(_as_parts(plain))
    table = read_json(index).get("tensors")
    if not isinstance(table, dict) or not all(map(_is_whole, table.values())):
        raise CheckFailed(f"{index}: not an index this version can read; resume from another one")
    return table


def _as_parts(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            stored = file.get_slice(key)
            shape = list(stored.get_shape())
            part = {"offsets": [0] * len(shape), "sizes": shape, "file": path.name, "key": key}
            yield key, {"dtype": stored.get_dtype(), "shape": shape, "parts": [part]}


def _is_whole(entry: Any) -> bool:
    """Whether parts cover a tensor: as many elements as it has, each file a plain name."""
    try:
        shape, parts = entry["shape"], entry["parts"]
        covered = sum(math.prod(part["sizes"]) for part in parts)
        plain = all(Path(part["file"]).name == part["file"] for part in parts)
        ranks = all(len(part["sizes"]) == len(part["offsets"]) == len(shape) for part in parts)
        return plain and ranks and covered == math.prod(shape) and entry["dtype"] in _DTYPES
    except (KeyError, TypeError):
        return False
