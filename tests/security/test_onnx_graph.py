"""Graphs that would read other files, load binaries or exhaust us are refused before a session."""

import contextlib
import random

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper, numpy_helper, onnx_ml_pb2

from gptopt.errors import CheckFailed
from gptopt.manifest import write_manifest
from gptopt.runtime import EdgeModel, graph
from gptopt.runtime.graph import check_graph

SECRET = b"\x01\x02\x03\x04" * 4


def external(location, name="w", **keys):
    """A float tensor (4,) whose data lies at `location`."""
    tensor = TensorProto(name=name, dims=[4], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **keys}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_with(tensor, where):
    """A valid model that holds a tensor in one of the places where tensors can hide."""
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    add = helper.make_node("Add", ["x", "w"], ["y"])
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    opsets = [helper.make_opsetid("", 21)]
    functions = []
    if where == "initializer":
        inner = helper.make_graph([add], "g", [info], [out], [tensor])
    elif where == "constant":
        inner = helper.make_graph([constant, add], "g", [info], [out])
    elif where == "sparse":
        indices = numpy_helper.from_array(np.arange(4), "i")
        sparse = helper.make_sparse_tensor(tensor, indices, [4])
        inner = helper.make_graph([add], "g", [info], [out], sparse_initializer=[sparse])
    elif where == "function":
        opsets.append(helper.make_opsetid("local", 1))
        functions = [helper.make_function("local", "F", ["x"], ["y"], [constant, add], opsets[:1])]
        call = helper.make_node("F", ["x"], ["y"], domain="local")
        inner = helper.make_graph([call], "g", [info], [out])
    elif where == "subgraph":
        branch = helper.make_graph([constant, add], "b", [], [out])
        flag = numpy_helper.from_array(np.array(True), "flag")
        node = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
        inner = helper.make_graph([node], "g", [info], [out], [flag])
    return helper.make_model(inner, opset_imports=opsets, ir_version=10, functions=functions)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "onnx" / "model.onnx_data").write_bytes(SECRET)
    return tmp_path / "onnx" / "model.onnx"


def write(path, model):
    path.write_bytes(model.SerializeToString())
    return path


PLACES = ["initializer", "constant", "function", "subgraph", "sparse"]


@pytest.mark.parametrize("where", PLACES[:2])
def test_the_data_file_beside_the_model_is_allowed(path, where):
    check_graph(write(path, model_with(external("model.onnx_data", offset=0, length=16), where)))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    "location",
    ["../secret", "a/../../secret", "/etc/passwd", "./model.onnx_data", "model.onnx", "", "secret",
     "model.onnx_data/../../secret", "..\\secret", "model.onnx_data\x00x", "*/_ORT_MEM_ADDR_/*"],
)  # fmt: skip
def test_any_other_location_is_refused(path, where, location):
    write(path, model_with(external(location), where))
    with pytest.raises(CheckFailed, match=r"only 'model.onnx_data' is allowed|which no exported"):
        check_graph(path)


def test_sparse_tensors_are_refused(path):
    write(path, model_with(external("model.onnx_data"), "sparse"))
    with pytest.raises(CheckFailed, match="holds a SparseTensorProto"):
        check_graph(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"offset": 0, "length": 17}, "ends at byte 17, model.onnx_data has 16"),
        ({"offset": 2**62, "length": 16}, "ends at byte"),
        ({"offset": -1}, "has the offset '-1'"),
        ({"length": "1e3"}, "has the length '1e3'"),
        ({"length": "9" * 400}, "has the length '999"),
        ({"length": "\u0661"}, "has the length"),
        ({"__class__": "x"}, "unknown or second key '__class__'"),
        ({"basepath": "/"}, "unknown or second key 'basepath'"),
    ],
)
def test_external_data_keys_are_few_and_bounded(path, keys, message):
    write(path, model_with(external("model.onnx_data", **keys), "initializer"))
    with pytest.raises(CheckFailed, match=message):
        check_graph(path)


def test_a_second_location_is_refused(path):
    tensor = external("model.onnx_data")
    tensor.external_data.add(key="location", value="../secret")
    write(path, model_with(tensor, "initializer"))
    with pytest.raises(CheckFailed, match="unknown or second key 'location'"):
        check_graph(path)


def test_entries_without_the_external_mark_are_checked_too(path):
    tensor = external("../secret")
    tensor.data_location = TensorProto.DEFAULT
    write(path, model_with(tensor, "initializer"))
    with pytest.raises(CheckFailed, match=r"only 'model.onnx_data' is allowed"):
        check_graph(path)


def test_nodes_that_load_compiled_binaries_are_refused(path):
    node = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="e.so")
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    write(path, helper.make_model(helper.make_graph([node], "g", [], [out])))
    with pytest.raises(CheckFailed, match="holds an EPContext node"):
        check_graph(path)


def test_deep_nesting_is_refused_without_recursion(path):
    inner = b""
    for _ in range(20_000):  # graph { node { attribute { g { ...
        for tag in (0x32, 0x2A, 0x0A):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            inner = bytes([tag]) + varint(len(inner)) + inner
    path.write_bytes(b"\x3a" + varint(len(inner)) + inner)
    with pytest.raises(CheckFailed, match="holds a graph inside a node"):
        check_graph(path)


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_endless_tiny_fields_are_refused(path, monkeypatch):
    monkeypatch.setattr(graph, "_MAX_FIELDS", 1000)
    path.write_bytes(b"\x08\x01" * 1001)
    with pytest.raises(CheckFailed, match="holds more than 1000 fields"):
        check_graph(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"ORTM", b"\xff" * 64, b"\x3a\xff\xff\xff\xff\x0f", b"\x0b", b"\x38\x01"],
)
def test_files_that_are_no_onnx_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckFailed, match=r"no ONNX|is empty"):
        check_graph(path)


def test_the_field_numbers_are_those_of_onnx():
    """Every way that leads from ModelProto to a TensorProto is walked or refused."""
    messages = onnx_ml_pb2.DESCRIPTOR.message_types_by_name

    def leads(name, seen=()):
        return name == "TensorProto" or any(
            field.message_type.name not in seen and leads(field.message_type.name, (*seen, name))
            for field in messages[name].fields
            if field.message_type is not None and field.message_type.name in messages
        )

    for name, children in graph.CHILDREN.items():
        expected = {
            field.number: field.message_type.name
            for field in messages[name].fields
            if field.message_type is not None
            and field.message_type.name in messages
            and leads(field.message_type.name)
        }
        assert children == expected, name
    reached = {child for children in graph.CHILDREN.values() for child in children.values()}
    assert reached - set(graph.CHILDREN) - graph.FORBIDDEN == {"TensorProto"}


def all_tensors(message):
    """Every TensorProto in a message, by protobuf's own reflection."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in [value] if isinstance(value, Message) else value:
            yield from all_tensors(item)


def test_what_passes_after_random_damage_reads_no_other_file():
    """Five thousand mutated graphs: refused, or protobuf too sees no other location."""
    rng = random.Random(0)
    seeds = []
    for where in (*PLACES[:2] * 4, *PLACES[2:4]):  # functions and branches never survive
        for location in ("model.onnx_data", "../secret"):
            model = model_with(external(location, offset=0, length=16), where)
            seeds.append(model.SerializeToString())
    survivors = []
    for _ in range(5000):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            match rng.randrange(4):
                case 0:
                    content[at] = rng.randrange(256)
                case 1:
                    content[at] ^= 1 << rng.randrange(8)
                case 2:
                    del content[at : at + rng.randint(1, 4)]
                case 3:
                    content[at:at] = rng.choice(seeds)[at : at + rng.randint(1, 40)]
        with contextlib.suppress(graph.Refused, DecodeError):
            graph.check_content(bytes(content), "model.onnx_data", 16)
            survivors.append(onnx_ml_pb2.ModelProto.FromString(bytes(content)))
    assert len(survivors) > 100
    for tensor in (tensor for model in survivors for tensor in all_tensors(model)):
        for entry in tensor.external_data:
            assert entry.key != "location" or entry.value == "model.onnx_data"


@pytest.mark.parametrize("location", ["../tokenizer.json", "/etc/hostname", "model.onnx"])
def test_a_folder_with_such_a_graph_and_a_fitting_manifest_is_refused(folder, location):
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = next(t for t in model.graph.initializer if t.external_data).external_data
    next(item for item in entry if item.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    write_manifest(folder, "edge")
    with pytest.raises(CheckFailed, match=r"only 'model.onnx_data' is allowed"):
        EdgeModel(folder, threads=1)


@pytest.mark.parametrize(
    ("domain", "kind", "message"),
    [
        ("evil", "Add", "holds an operator of the unknown domain 'evil'"),
        ("evil\nx" * 400, "Add", r"unknown domain 'evil\\nx"),
        ("", "Evil", r"model.onnx: onnxruntime refuses it .*Evil"),
    ],
)
def test_unknown_operators_are_refused(folder, domain, kind, message):
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[-1].domain, model.graph.node[-1].op_type = domain, kind
    path.write_bytes(model.SerializeToString())
    write_manifest(folder, "edge")
    with pytest.raises(CheckFailed, match=message) as caught:
        EdgeModel(folder, threads=1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_graph_that_fails_while_running_is_a_failed_check(folder):
    """A position table too short for its block_size: onnxruntime meets it only at run time."""
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    table = next(t for t in model.graph.initializer if t.name == "wpe")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:4], "wpe"))
    onnx.save(model, path)
    (folder / "onnx" / "model.onnx_data").unlink()
    write_manifest(folder, "edge")
    with pytest.raises(CheckFailed, match="onnxruntime cannot run the graph"):
        EdgeModel(folder, threads=1).forward([[1, 2, 3, 4, 5, 6]])
