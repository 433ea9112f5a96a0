"""Adapter files from a stranger: nothing is believed before it was compared, nothing crashes.

onnxruntime parses its own adapter format in C++. Each attack has a manifest that agrees with it, as
a stranger's folder would.
"""

import json
import random
import struct

import numpy as np
import pytest

from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import write_manifest
from gptopt.runtime.adapters import Slots, adapter_names, read_adapter, read_matrices

ort = pytest.importorskip("onnxruntime")


class Item:
    """An optional input of a session."""

    def __init__(self, *shape):
        self.shape, self.type = list(shape), "tensor(float)"


SLOTS = Slots(
    {
        "a.lora_A": Item(6, "a.rank"), "a.lora_B": Item("a.rank", 4),
        "b.lora_A": Item(4, "b.rank"), "b.lora_B": Item("b.rank", 8), "other": Item(3),
    }
)  # fmt: skip
GOOD = {
    "a.lora_A": np.ones((6, 2), np.float32), "a.lora_B": np.ones((2, 4), np.float32),
}  # fmt: skip


def write(path, matrices):
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {n: ort.OrtValue.ortvalue_from_numpy(m) for n, m in matrices.items()}
    adapter.set_parameters(values)
    adapter.export_adapter(str(path))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "onnx").mkdir()
    write(tmp_path / "onnx" / "one.onnx_adapter", GOOD)
    told = {"gptopt_edge": {"target": "portable", "files": {}, "adapters": ["one"]}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    write_manifest(tmp_path, "edge")
    return tmp_path


def test_a_good_adapter_is_read_and_unused_layers_stay_at_rank_zero(folder):
    matrices = read_adapter(folder, "one", SLOTS)
    assert {name: m.tolist() for name, m in matrices.items()} == {
        name: m.tolist() for name, m in GOOD.items()
    }
    whole = SLOTS.filled(matrices)
    assert {name: m.shape for name, m in whole.items()} == {
        "a.lora_A": (6, 2), "a.lora_B": (2, 4), "b.lora_A": (4, 0), "b.lora_B": (0, 8),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a.lora_B": None}, "lacks one of its two matrices"),
        ({"c.lora_A": np.ones((6, 2), np.float32)}, "'c' has no place in the graph"),
        ({"a.bias": np.ones((2, 2), np.float32)}, "is no adapter's"),
        ({"wte.weight": np.ones((2, 2), np.float32)}, "no place in the graph"),
        ({"num_logits_to_keep": np.ones(1, np.float32)}, "no place in the graph"),
        ({"a.lora_A": np.ones((7, 2), np.float32)}, r"\[7, 2\], the graph asks for float32 \[6, 2"),
        ({"a.lora_B": np.ones((3, 4), np.float32)}, r"\[3, 4\], the graph asks"),
        ({"a.lora_A": np.ones((6, 2, 1), np.float32)}, "the graph asks"),
        ({"a.lora_A": np.ones((6, 2), np.float16)}, "matrix float16"),
        ({"a.lora_A": np.ones((6, 2), np.int64)}, "no matrix of floats"),
        ({"a.lora_A": np.full((6, 2), np.nan, np.float32)}, "not finite"),
        ({"a.lora_B": np.full((2, 4), np.inf, np.float32)}, "not finite"),
    ],
)
def test_matrices_that_are_not_the_graphs_are_refused(folder, changes, said):
    changed = {n: m for n, m in {**GOOD, **changes}.items() if m is not None}
    write(folder / "onnx" / "one.onnx_adapter", changed)
    write_manifest(folder, "edge")
    with pytest.raises(CheckFailed, match=said) as caught:
        read_adapter(folder, "one", SLOTS)
    assert "\n" not in str(caught.value)


def test_a_changed_or_linked_file_is_refused_before_it_is_parsed(folder, monkeypatch):
    monkeypatch.setattr(ort.AdapterFormat, "read_adapter", None)  # whoever parses it fails
    path = folder / "onnx" / "one.onnx_adapter"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckFailed, match="sha256 differs"):
        read_adapter(folder, "one", SLOTS)
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(CheckFailed, match="is a link"):
        read_adapter(folder, "one", SLOTS)


def test_an_adapter_that_no_manifest_lists_is_refused(folder):
    listed = json.loads((folder / "manifest.json").read_text())
    del listed["files"]["onnx/one.onnx_adapter"]
    (folder / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(CheckFailed, match="manifest"):
        read_adapter(folder, "one", SLOTS)


@pytest.mark.parametrize(
    "names", ["one", {"one": 1}, [1], ["../one"], ["a/b"], ["one\n"], [""], ["x" * 60], [None]]
)
def test_names_that_are_none_are_refused(folder, names):
    told = {"gptopt_edge": {"adapters": names}}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(CheckFailed, match=r"gptopt_edge\.adapters"):
        adapter_names(folder)


@pytest.mark.parametrize("name", ["two", "../one", "one.onnx_adapter", ""])
def test_an_unknown_name_is_told_with_the_known_ones(folder, name):
    with pytest.raises(UserError, match=r"has no adapter .*; it has one"):
        read_adapter(folder, name, SLOTS)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"TORT", b"PK\x03\x04" * 100, b"\x08\0\0\0TORT" + b"\xff" * 400]
)
def test_files_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "x.onnx_adapter"
    path.write_bytes(content)
    with pytest.raises(CheckFailed, match="onnxruntime refuses it"):
        read_matrices(path, SLOTS)


def test_sizes_beyond_the_bytes_are_refused(tmp_path):
    path = tmp_path / "x.onnx_adapter"
    write(path, GOOD)
    content = path.read_bytes()
    at = content.find(struct.pack("<qq", 6, 2))
    for dims in ((6, 2000), (2**40, 2**40), (-1, 2), (-6, -2), (2**62, 4)):
        path.write_bytes(content[:at] + struct.pack("<qq", *dims) + content[at + 16 :])
        with pytest.raises(CheckFailed):
            read_matrices(path, SLOTS)


def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path):
    path = tmp_path / "x.onnx_adapter"
    write(path, GOOD)
    content, draw, refused = path.read_bytes(), random.Random(5), []
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 4))):
            changed[draw.randrange(len(changed))] = draw.choice((0, 1, 127, 128, 255))
        path.write_bytes(changed[: draw.choice((len(changed), draw.randrange(len(changed))))])
        try:
            matrices = read_matrices(path, SLOTS)
        except CheckFailed as error:
            refused.append(str(error))
        else:
            SLOTS.check(matrices, "x")
    assert 200 < len(refused) < 400
    assert not any("\n" in line for line in refused)
