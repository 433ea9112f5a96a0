import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptopt.config import DataOptions
from gptopt.data import open_dataset
from gptopt.data.shards import Dataset, ShardWriter, TokenSplit, dtype_for
from gptopt.errors import CheckFailed, UserError


@pytest.fixture
def folder(make, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    make(text)
    return tmp_path / "data"


def edit_index(folder, change):
    path = folder / "dataset.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_dtype_is_the_smallest_that_holds_every_id():
    assert dtype_for(2**16) == "uint16"
    assert dtype_for(2**16 + 1) == "uint32"


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_reads_across_shards_equal_the_tokens_written(tmp_path_factory, data):
    tokens = data.draw(st.lists(st.integers(0, 70_000), min_size=1, max_size=60))
    shard_tokens = data.draw(st.integers(1, 20))
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "train", "uint32", shard_tokens=shard_tokens) as writer:
        place = 0
        while place < len(tokens):
            count = data.draw(st.integers(1, 30))
            writer.write(tokens[place : place + count])
            place += count
        entries = writer.close()
    assert [entry["tokens"] for entry in entries[:-1]] == [shard_tokens] * (len(entries) - 1)
    split = TokenSplit(folder, "train", entries, "uint32", 70_001)
    assert len(split) == len(tokens)
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    assert split.read(start, stop).tolist() == tokens[start:stop]


def test_batch_gives_blocks_and_the_token_after_them(tmp_path):
    with ShardWriter(tmp_path, "val", "uint16", shard_tokens=7) as writer:
        writer.write(list(range(50)))
        split = TokenSplit(tmp_path, "val", writer.close(), "uint16", 50)
    batch = split.batch(np.array([0, 5, 41]), 8)
    assert batch.dtype == np.int64
    assert batch.tolist() == [list(range(start, start + 9)) for start in (0, 5, 41)]
    with pytest.raises(IndexError):
        split.batch([42], 8)


def test_shards_are_raw_little_endian(tmp_path):
    with ShardWriter(tmp_path, "train", "uint32") as writer:
        writer.write([1, 2**17])
        writer.close()
    assert (tmp_path / "train-00000.bin").read_bytes() == b"\1\0\0\0\0\0\2\0"


def test_sha256_of_a_dataset_is_its_content_and_not_its_place(make, folder, tmp_path):
    first = Dataset(folder)
    folder.rename(tmp_path / "moved")
    assert Dataset(tmp_path / "moved").sha256 == first.sha256
    other, _ = make(tmp_path / "text.txt", out="other", val_fraction=0.2)
    assert other.sha256 != first.sha256


def test_an_empty_validation_split_has_no_tokens(make, tmp_path):
    (tmp_path / "text.txt").write_text("all of it trains")
    dataset, summary = make(tmp_path / "text.txt", val_fraction=0)
    assert len(dataset.val) == summary["val_tokens"] == 0
    assert len(dataset.train) == 16
    assert dataset.split("val") is dataset.val
    with pytest.raises(UserError, match="no split 'test'"):
        dataset.split("test")


def changed_byte(folder):
    path = folder / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    return r"train-00000\.bin: its sha256 differs"


def odd_size(folder):
    with (folder / "train-00000.bin").open("ab") as file:
        file.write(b"x")
    return r"train-00000\.bin: has 1729 bytes, dataset\.json says 864 tokens of uint16 = 1728"


def missing_shard(folder):
    (folder / "val-00000.bin").unlink()
    return r"val-00000\.bin: listed in dataset\.json but missing"


def other_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"normalizer": null', '"normalizer":  null'))
    return r"tokenizer\.json: its sha256 differs"


def wrong_dtype(folder):
    edit_index(folder, lambda index: index.update(dtype="uint32"))
    return "864 tokens of uint32 = 3456"


def unknown_dtype(folder):
    edit_index(folder, lambda index: index.update(dtype="object"))
    return "not as gptopt writes them"


def path_that_leaves_the_folder(folder):
    edit_index(folder, lambda index: index["splits"]["train"][0].update(file="train-/../../x.bin"))
    return "not as gptopt writes them"


def no_validation_split(folder):
    edit_index(folder, lambda index: index["splits"].pop("val"))
    return "not as gptopt writes them"


def negative_count(folder):
    edit_index(folder, lambda index: index["splits"]["train"][0].update(tokens=-1))
    return "not as gptopt writes them"


@pytest.mark.parametrize(
    "change",
    [
        changed_byte,
        odd_size,
        missing_shard,
        other_tokenizer,
        wrong_dtype,
        unknown_dtype,
        path_that_leaves_the_folder,
        no_validation_split,
        negative_count,
    ],
)
def test_a_changed_data_folder_is_refused(folder, change):
    expected = change(folder)
    with pytest.raises(CheckFailed, match=expected):
        open_dataset([str(folder)], DataOptions())


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"format": 2}', "\0"])
def test_a_broken_index_is_refused(folder, content):
    (folder / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json: "):
        Dataset(folder)


def test_an_id_outside_the_vocabulary_is_refused(folder):
    import hashlib

    path = folder / "train-00000.bin"
    content = path.read_bytes()[:-2] + b"\xff\x00"
    path.write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest()}
    edit_index(folder, lambda index: index["splits"]["train"][0].update(entry))
    with pytest.raises(CheckFailed, match=r"holds token id 255, its tokenizer has 12 ids"):
        Dataset(folder)
    unverified = Dataset(folder, verify=False)
    with pytest.raises(CheckFailed, match="the train split holds token id 255"):
        unverified.train.read(0, len(unverified.train))


def test_verification_of_hashes_is_optional(folder):
    changed_byte(folder)
    Dataset(folder, verify=False)
    with pytest.raises(CheckFailed):
        Dataset(folder)
