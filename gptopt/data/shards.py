"""Token shards on disk: raw little-endian integers beside an index that is checked before use."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from gptopt.data.sampler import Sampler
from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import read_json, sha256_of, write_json
from gptopt.tokenizer import Tokenizer

INDEX = "dataset.json"
FORMAT = 1
SHARD_TOKENS = 100_000_000
SPLITS = ("train", "val")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(size: int) -> str:
    """The name of the smallest shard dtype that holds every id below `size`."""
    return "uint16" if size <= 2**16 else "uint32"


class ShardWriter:
    """Appends ids to the numbered shards of one split; `close` gives their index entries."""

    def __init__(
        self, folder: Path, split: str, dtype: str, *, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = _DTYPES[dtype]
        self._shard_tokens = shard_tokens
        self._entries: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self.tokens = 0

    def write(self, ids: list[int]) -> None:
        """Append ids, which the dtype must hold."""
        data = np.asarray(ids, dtype=self._dtype)
        while len(data):
            if self._file is None:
                self._open()
            part = data[: self._shard_tokens - self._entries[-1]["tokens"]]
            self._append(part)
            data = data[len(part) :]

    def _open(self) -> None:
        name = f"{self._split}-{len(self._entries):05d}.bin"
        self._file = (self._folder / name).open("wb")
        self._hash = hashlib.sha256()
        self._entries.append({"file": name, "tokens": 0, "sha256": ""})

    def _append(self, part: npt.NDArray[Any]) -> None:
        assert self._file is not None
        content = part.tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._entries[-1]["tokens"] += len(part)
        self.tokens += len(part)
        if self._entries[-1]["tokens"] == self._shard_tokens:
            self._finish()

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._entries[-1]["sha256"] = self._hash.hexdigest()

    def close(self) -> list[dict[str, Any]]:
        """Close the last shard. The entries: file, tokens, sha256 of each shard."""
        self._finish()
        return self._entries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._finish()


class TokenSplit:
    """The tokens of one split: its shards, mapped into memory, read as if they were one."""

    def __init__(
        self, folder: Path, name: str, entries: list[dict[str, Any]], dtype: str, size: int
    ) -> None:
        self.name = name
        self._size = size
        self._shards = [_mapped(folder / entry["file"], _DTYPES[dtype]) for entry in entries]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    @classmethod
    def joined(cls, splits: "Sequence[TokenSplit]") -> Self:
        """Splits of one tokenizer and one name, one behind the other."""
        whole = cls.__new__(cls)
        whole.name, whole._size = splits[0].name, splits[0]._size
        whole._shards = [shard for split in splits for shard in split._shards]
        whole._starts = np.cumsum([0, *(len(shard) for shard in whole._shards)])
        return whole

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The tokens from start up to stop (not included), as int64 (stop - start,)."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}..{stop} of a split of {len(self)}")
        parts = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for shard, begin in zip(self._shards[first:], self._starts[first:], strict=False):
            if begin >= stop:
                break
            parts.append(shard[max(0, start - begin) : stop - begin])
        tokens = np.concatenate(parts or [np.empty(0)]).astype(np.int64)
        if len(tokens) and int(tokens.max()) >= self._size:
            raise CheckFailed(
                f"the {self.name} split holds token id {int(tokens.max())}, its tokenizer has "
                f"{self._size} ids; run gptopt tokenize again"
            )
        return tokens

    def batch(self, offsets: npt.ArrayLike, block_size: int) -> npt.NDArray[np.int64]:
        """Blocks of block_size + 1 tokens that start at the offsets (B,): int64 (B, T + 1)."""
        starts = np.asarray(offsets, dtype=np.int64).tolist()
        return np.stack([self.read(start, start + block_size + 1) for start in starts])


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r")


class Dataset:
    """A data folder, opened and checked: its tokenizer and its splits.

    Attributes:
        tokenizer: the tokenizer that made the ids.
        index: the content of dataset.json.
        sha256: hex sha256 over the tokenizer and every token, wherever the folder lies.
        train, val: the splits; val is empty where nothing was held out.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.tokenizer = Tokenizer.load(folder)
        stated = self.index["tokenizer_sha256"]
        if self.tokenizer.sha256 != stated:
            raise CheckFailed(
                f"{folder / 'tokenizer.json'}: its sha256 differs from {INDEX}, the file was "
                f"changed; run gptopt tokenize again"
            )
        splits = self.index["splits"]
        for entry in (entry for name in SPLITS for entry in splits[name]):
            _check_shard(folder, entry, self.index["dtype"], self.tokenizer.size, verify=verify)
        self.train, self.val = (
            TokenSplit(folder, name, splits[name], self.index["dtype"], self.tokenizer.size)
            for name in SPLITS
        )
        identity = [stated, self.index["dtype"]]
        identity += [[(e["sha256"], e["tokens"]) for e in splits[name]] for name in SPLITS]
        self.sha256: str = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def sampler(
        self, block_size: int, batch_size: int, seed: int, rank: int, world: int
    ) -> Sampler:
        """Offsets of blocks in `train`.

        Raises:
            UserError: there are fewer tokens than a block has.
        """
        return Sampler(len(self.train), block_size, batch_size, seed, rank, world)

    def split(self, name: str) -> TokenSplit:
        """The split called train or val.

        Raises:
            UserError: there is no such split.
        """
        if name not in SPLITS:
            raise UserError(f"{self.folder}: no split {name!r}; choose train or val")
        return self.train if name == "train" else self.val


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write dataset.json, the last file of a data folder."""
    write_json(folder / INDEX, {"format": FORMAT, **index})


def read_index(folder: Path) -> dict[str, Any]:
    """dataset.json, proven to have the form this version writes."""
    path = folder / INDEX
    index = read_json(path)
    if index.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {index.get('format')!r}, this version reads {FORMAT}; "
            f"run gptopt tokenize again"
        )
    splits = index.get("splits")
    well_formed = (
        index.get("dtype") in list(_DTYPES)
        and isinstance(index.get("tokenizer_sha256"), str)
        and isinstance(splits, dict)
        and all(isinstance(splits.get(name), list) for name in SPLITS)
        and all(_is_entry(entry, name) for name in SPLITS for entry in splits[name])
    )
    if not well_formed:
        raise CheckFailed(
            f"{path}: dtype, tokenizer_sha256 or splits are not as gptopt writes them; "
            f"run gptopt tokenize again"
        )
    return index


def _is_entry(entry: Any, split: str) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("tokens"), int)
        and entry["tokens"] > 0
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("file"), str)
        # Only names that the writer gives, so none leads out of the folder.
        and entry["file"].startswith(f"{split}-")
        and entry["file"].endswith(".bin")
        and entry["file"][len(split) + 1 : -4].isdecimal()
    )


def _check_shard(
    folder: Path, entry: dict[str, Any], dtype: str, size: int, *, verify: bool
) -> None:
    path = folder / entry["file"]
    if not path.is_file():
        raise CheckFailed(f"{path}: listed in {INDEX} but missing; copy the folder whole")
    expected = entry["tokens"] * _DTYPES[dtype].itemsize
    found = path.stat().st_size
    if found != expected:
        raise CheckFailed(
            f"{path}: has {found} bytes, {INDEX} says {entry['tokens']} tokens of {dtype} = "
            f"{expected} bytes; copy it again"
        )
    if not verify:
        return
    if sha256_of(path) != entry["sha256"]:
        raise CheckFailed(
            f"{path}: its sha256 differs from {INDEX}, the file was changed; copy it again"
        )
    largest = int(_mapped(path, _DTYPES[dtype]).max())
    if largest >= size:
        raise CheckFailed(
            f"{path}: holds token id {largest}, its tokenizer has {size} ids; "
            f"run gptopt tokenize again"
        )
