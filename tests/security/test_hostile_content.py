"""Folders whose files lie about themselves: one line each, at once, in little memory, no traces.

Their manifests fit: whoever made the folder made the manifest too.
"""

import contextlib
import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from gptopt.checkpoint import load_model, save_model
from gptopt.cli import main
from gptopt.config import ModelConfig, SamplingOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.manifest import write_manifest
from gptopt.model import GPT
from gptopt.runtime import EdgeModel
from gptopt.runtime.folder import file_marks
from gptopt.runtime.graph import check_graph
from gptopt.tokenizer import Tokenizer


def refused(folder, message, use=lambda model: None):
    """Load a hostile folder as a stranger would have made it; the error is one short line."""
    write_manifest(folder, "edge")
    marks = file_marks(folder.parent)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            model = EdgeModel(folder, threads=1)
            model.tokenizer  # noqa: B018 - it is read when asked for
            use(model)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    assert peak < 2**26
    assert file_marks(folder.parent) == marks  # nothing was written
    return caught.value


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_graph(folder, change):
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


SIZES = {
    "fewer layers": {"n_layer": 1},
    "more layers": {"n_layer": 3},
    "thousands of layers": {"n_layer": 4096},
    "other heads": {"n_head": 4},
    "fewer heads for keys": {"n_kv_head": 1},
    "wider": {"n_embd": 2**30},
    "a larger vocabulary": {"vocab_size": 2**31 - 1},
    "no layers": {"n_layer": 0},
    "negative": {"n_embd": -16},
    "a number of 4000 digits": {"vocab_size": 10**4000},
    "not a number": {"n_layer": float("nan")},
    "bidirectional": {"causal": False},
    "a tokenizer of another size": {"tokenizer_size": 5},
    "a tokenizer larger than the model": {"tokenizer_size": 2**40},
    "an unknown key": {"exec": "rm"},
}


@pytest.mark.parametrize("lie", SIZES.values(), ids=SIZES)
def test_sizes_that_lie_are_refused(folder, lie):
    edit_json(folder / "config.json", lambda values: values["gptopt"].update(lie))
    refused(folder, "config.json|ids")


@pytest.mark.parametrize("size", [10**6, 2**20, 2**31 - 1, 2**40])
def test_a_context_that_lies_ends_in_a_line_when_it_is_used(folder, size, capfd):
    edit_json(folder / "config.json", lambda values: values["gptopt"].update(block_size=size))

    def use(model):
        model.generate([[1] * 40], SamplingOptions(max_new_tokens=2, temperature=0.0))

    refused(folder, "block_size|model.onnx: onnxruntime cannot run", use)
    assert not capfd.readouterr().err  # onnxruntime does not print it as well


FACTS = {
    "a path outside": {"file": "../secret.onnx"},
    "an absolute path": {"file": "/etc/passwd"},
    "a file that is not there": {"file": "onnx/model_q9.onnx"},
    "an unknown cache": {"cache": "everywhere"},
    "a cache it does not have": {"cache": "shared"},
    "another type of cache": {"cache_dtype": "int8"},
    "padding of a growing cache": {"padding": "right"},
}


@pytest.mark.parametrize("lie", FACTS.values(), ids=FACTS)
def test_facts_that_lie_are_refused(folder, lie):
    told = {"target": "x", "files": {"fp32": {"file": "onnx/model.onnx", **lie}}}
    edit_json(folder / "config.json", lambda values: values.update(gptopt_edge=told))

    def use(model):
        model.generate([[1, 2, 3]], SamplingOptions(max_new_tokens=2, temperature=0.0))

    refused(folder, "gptopt_edge|model|precision|onnx", use)


JSON = {
    "deep": b'{"gptopt":' + b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "not utf-8": b'{"gptopt": "\xff\xfe"}',
    "utf-16": '{"gptopt": {}}'.encode("utf-16"),
    "a long number": b'{"gptopt": ' + b"9" * 10_000 + b"}",
    "cut off": b'{"gptopt": {"n_layer": 2,',
    "two values": b"{} {}",
    "a list": b"[]",
    "empty": b"",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_is_none_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, name)


def test_json_is_read_up_to_a_size(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**24 + 1)
    refused(folder, "has 16777217 bytes, at most 16777216 expected")
    (folder / "config.json").write_text("{}")
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(2**27)
    with pytest.raises(UserError, match=r"manifest.json: has 134217728 bytes, at most"):
        EdgeModel(folder)


def grown(steps, times):
    parts = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * times}] * steps
    return {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": parts}]}


TOKENIZERS = {
    "text that explodes": lambda spec: spec.update(normalizer=grown(8, 100)),
    "one long replacement": lambda spec: spec.update(normalizer=grown(1, 10**6)),
    "decoding that explodes": lambda spec: spec.update(decoder={
        "type": "Sequence", "decoders": grown(6, 50)["normalizers"][0]["normalizers"]}),
    "a vocabulary of another size": lambda spec: spec["model"]["vocab"].update({"zzzz": 10**6}),
    "an id beyond 32 bits": lambda spec: spec["model"]["vocab"].update({"zzzz": 2**40}),
    "a negative id": lambda spec: spec["model"]["vocab"].update({"zzzz": -1}),
    "merges of nothing": lambda spec: spec["model"].update(merges=[["no", "where"]]),
    "an unknown model": lambda spec: spec["model"].update(type="Exec"),
    "a broken expression": lambda spec: spec.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(" * 500}, "behavior": "Isolated",
                       "invert": False}),
    "a normalizer that is a number": lambda spec: spec.update(normalizer=5),
    "a deep normalizer": lambda spec: spec.update(normalizer=deep(300)),
}  # fmt: skip


def deep(levels):
    found = {"type": "NFC"}
    for _ in range(levels):
        found = {"type": "Sequence", "normalizers": [found]}
    return found


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_lie_are_refused(folder, change, capfd):
    edit_json(folder / "tokenizer.json", change)
    refused(folder, "tokenizer.json")


def test_known_replacements_are_taken(folder):
    """What tokenizers made of SentencePiece models do."""

    def change(spec):
        part = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        spec["normalizer"] = {"type": "Sequence", "normalizers": [part] * 3}

    edit_json(folder / "tokenizer.json", change)
    Tokenizer.load(folder)


def test_a_graph_cut_anywhere_is_refused(folder):
    path = folder / "onnx" / "model.onnx"
    whole = path.read_bytes()
    passed = []
    for length in {*range(0, len(whole), 13), *range(len(whole) - 64, len(whole))}:
        path.write_bytes(whole[:length])
        try:
            check_graph(path)
        except CheckFailed as error:
            lines = str(error).splitlines()
        else:
            lines = [""]
            passed.append(length)
        assert len(lines) == 1
    assert 0 < len(passed) < 20  # cut between two fields of the model itself
    ids = [[1, 2, 3]]
    path.write_bytes(whole)
    write_manifest(folder, "edge")
    right = EdgeModel(folder, threads=1).forward(ids)[0]
    for length in passed:
        path.write_bytes(whole[:length])
        write_manifest(folder, "edge")
        with contextlib.suppress(CheckFailed):  # or nothing that counts was cut
            assert np.array_equal(EdgeModel(folder, threads=1).forward(ids)[0], right)


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.99])
def test_data_that_is_cut_is_refused(folder, kept):
    path = folder / "onnx" / "model.onnx_data"
    size = path.stat().st_size
    os.truncate(path, int(size * kept) if kept != 1 else size - 1)
    refused(folder, r"ends at byte \d+, model.onnx_data has|holds no bytes")


def weight(model):
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def set_dims(*dims):
    def change(model):
        tensor = weight(model)
        tensor.ClearField("dims")
        tensor.dims.extend(dims)

    return change


def set_key(key, value):
    def change(model):
        found = next(entry for entry in weight(model).external_data if entry.key == key)
        found.value = value

    return change


def add_large(model):
    shape = numpy_helper.from_array(np.array([2**25, 2**25]), "huge_shape")
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["huge_shape"], ["huge"]))
    model.graph.node.insert(1, helper.make_node("ReduceSum", ["huge"], ["all"], keepdims=0))
    last = model.graph.node[-1]
    name, last.output[0] = last.output[0], "before"
    model.graph.node.append(helper.make_node("Add", ["before", "all"], [name]))


GRAPHS = {
    "a tensor of 2^60 numbers": set_dims(2**30, 2**30),
    "sizes that overflow": set_dims(2**62, 2**62),
    "a negative size": set_dims(-1, 16),
    "more numbers than bytes": set_dims(320, 160),
    "an offset of 2^63": set_key("offset", str(2**63 - 1)),
    "a length of 2^63": set_key("length", str(2**63 - 1)),
    "offset and length that overflow": set_key("offset", str(2**64 - 8)),
    "a constant of 2^50 numbers": add_large,
    "no nodes": lambda model: model.graph.ClearField("node"),
    "a node that reads itself": lambda model: model.graph.node[0].input.append(
        model.graph.node[-1].output[0]),
    "an odd name": lambda model: setattr(model.graph.input[0], "name", "input_ids\n\x1b[31m\x00"),
    "opset of the future": lambda model: setattr(model.opset_import[0], "version", 2**40),
    "no opset": lambda model: model.ClearField("opset_import"),
}  # fmt: skip


@pytest.mark.parametrize("change", GRAPHS.values(), ids=GRAPHS)
def test_graphs_that_lie_are_refused(folder, change):
    edit_graph(folder, change)

    def use(model):
        model.forward([[1, 2, 3]])

    refused(folder, "onnx", use)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json", "onnx/model.onnx_data"])
def test_a_file_swapped_after_the_check_is_noticed(folder, tmp_path, monkeypatch, name):
    import gptopt.runtime.edge as edge

    other = Path(shutil.copy(folder / name, tmp_path / "other"))
    load = edge.model_file

    def swap(*given):
        found = load(*given)
        other.replace(folder / name)  # the same bytes: only the file is another one
        return found

    monkeypatch.setattr(edge, "model_file", swap)
    with pytest.raises(CheckFailed, match="was changed while it was read; load it again"):
        EdgeModel(folder, threads=1)


@pytest.fixture
def model_folder(tmp_path):
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16)
    path = tmp_path / "model"
    path.mkdir()
    torch.manual_seed(0)
    save_model(path, GPT(config), None)
    return path


def lied(folder, message):
    marks = file_marks(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert file_marks(folder) == marks


def with_header(folder, change):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    change(header, header[first])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


HEADERS = {
    "numbers beyond the file": lambda h, t: t.update(data_offsets=[0, 2**62]),
    "backwards": lambda h, t: t.update(data_offsets=[8, 0]),
    "negative": lambda h, t: t.update(data_offsets=[-8, 8]),
    "sizes that overflow": lambda h, t: t.update(shape=[2**40, 2**40]),
    "more numbers than bytes": lambda h, t: t.update(shape=[10**6]),
    "an unknown type": lambda h, t: t.update(dtype="OBJECT"),
    "a tensor like another": lambda h, t: h.update(extra=dict(t)),
    "no shape": lambda h, t: t.pop("shape"),
    "deep": lambda h, t: t.update(shape=json.loads("[" * 200 + "]" * 200)),
    "no tensors": lambda h, t: h.clear(),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_weights_whose_header_lies_are_refused(model_folder, change):
    with_header(model_folder, change)
    lied(model_folder, "model.safetensors|tensors")


@pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_weights_whose_header_has_another_length_are_refused(model_folder, length):
    path = model_folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    lied(model_folder, "not readable as safetensors")


def test_weights_cut_anywhere_are_refused(model_folder):
    path = model_folder / "model.safetensors"
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 97), *range(12), len(whole) - 1}:
        path.write_bytes(whole[:length])
        lied(model_folder, "not readable as safetensors")


@pytest.mark.parametrize(
    "lie",
    [{"n_layer": 4096}, {"n_layer": 2}, {"n_embd": 2**30}, {"vocab_size": 2**31 - 1},
     {"n_head": 3}, {"n_positions": 2**40}, {"n_inner": 2**40}, {"model_type": "\x00evil\n"}],
)  # fmt: skip
def test_a_model_whose_sizes_lie_is_refused(model_folder, lie):
    path = model_folder / "config.json"
    values = json.loads(path.read_text())
    own = {"n_positions": "block_size"}
    inner = {own.get(key, key): value for key, value in lie.items() if key != "model_type"}
    values |= lie
    values["gptopt"] = {**values.get("gptopt", {}), **inner} if "gptopt" in values else None
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    lied(model_folder, "config.json|safetensors|tensors")


def test_foreign_weights_are_named(model_folder):
    save_file({"conv.weight": torch.zeros(3, 3)}, model_folder / "model.safetensors")
    lied(model_folder, "model.safetensors|conv.weight")


COMMANDS = {
    "edge": (lambda folder: os.truncate(folder / "tokenizer.json", 100), 1),
    "nothing there": (lambda folder: shutil.rmtree(folder), 2),
    "not ours": (lambda folder: (folder / "manifest.json").unlink(), 2),
}


@pytest.mark.parametrize(("harm", "code"), COMMANDS.values(), ids=COMMANDS)
def test_the_command_line_says_one_line_and_no_traceback(folder, harm, code, capsys):
    harm(folder)
    assert main(["run", str(folder), "--prompt", "x"]) == code
    shown = capsys.readouterr()
    assert not shown.out
    assert "Traceback" not in shown.err
    assert len(shown.err.strip().splitlines()) == 1
