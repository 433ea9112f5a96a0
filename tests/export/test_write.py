"""Writing a graph: equal bytes once, aligned, nothing outside the file, nothing half-written."""

import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from gptopt.errors import CheckFailed, UserError
from gptopt.export import write
from gptopt.export.write import save, shared_bytes, wants_data_file, weight_bytes
from gptopt.runtime.graph import check_graph


def initializer(graph, name, array):
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


@pytest.fixture
def model():
    """y = x @ A + sum of A's elements seen as a row; A and its row are one array."""
    rng = np.random.default_rng(0)
    square = rng.standard_normal((96, 96)).astype(np.float32)
    large = rng.standard_normal((96, 4096)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape(["n", 96]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    a = initializer(graph, "a", square)
    row = initializer(graph, "row", square.reshape(-1))
    wide = initializer(graph, "wide", large)
    axes = initializer(graph, "axes", np.array([0], dtype=np.int64))
    product = ir.node("MatMul", [x, a])
    total = ir.node("ReduceSum", [row, axes], {"keepdims": 1})
    shifted = ir.node("Add", [product.outputs[0], total.outputs[0]])
    out = ir.node("MatMul", [shifted.outputs[0], wide])
    for node in (product, total, shifted, out):
        graph.append(node)
    y = out.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 4096])
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


def answer(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 96), dtype=np.float32)})[0]


def places(path):
    """Initializer -> (offset, length) in the data file."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == path.name + "_data"
            found[tensor.name] = int(entries["offset"]), int(entries["length"])
    return found


def test_equal_bytes_are_stored_once_and_say_the_same(model, tmp_path):
    inline, outside = tmp_path / "inline.onnx", tmp_path / "model.onnx"
    save(model, inline, external=False)
    written = save(model, outside, external=True)
    found = places(outside)
    assert found["a"] == found["row"]
    assert found["wide"] != found["a"]
    assert written.shared_bytes == shared_bytes(model) == 96 * 96 * 4
    stored = (tmp_path / "model.onnx_data").stat().st_size
    assert stored == written.data_bytes
    assert stored < weight_bytes(model) - written.shared_bytes + 4096
    np.testing.assert_array_equal(answer(inline), answer(outside))


def test_weights_lie_beside_the_graph_where_that_saves_bytes(model, monkeypatch):
    size = weight_bytes(model)
    assert wants_data_file(model, size - 1)
    assert not wants_data_file(model, size)
    monkeypatch.setattr(write, "_WORTH_A_FILE", shared_bytes(model))
    assert wants_data_file(model, size)


def test_bytes_are_shared_wherever_they_are_equal(model, tmp_path):
    value = model.graph.initializers["row"]
    value.const_value = ir.Tensor(value.const_value.numpy().copy(), name="row")
    assert shared_bytes(model) == 0
    assert save(model, tmp_path / "model.onnx", external=True).shared_bytes == 96 * 96 * 4


def test_offsets_are_aligned_and_small_tensors_stay_inside(model, tmp_path):
    path = tmp_path / "model.onnx"
    save(model, path, external=True)
    found = places(path)
    assert set(found) == {"a", "row", "wide"}
    assert found["wide"][0] % 4096 == 0
    assert found["a"][0] % 64 == 0


def test_the_runtime_accepts_overlapping_data_and_refuses_what_lies_outside(model, tmp_path):
    path = tmp_path / "model.onnx"
    save(model, path, external=True)
    check_graph(path)
    data = tmp_path / "model.onnx_data"
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - 1)
    with pytest.raises(CheckFailed, match="ends at byte"):
        check_graph(path)


def test_the_model_is_not_changed(model, tmp_path):
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    save(model, tmp_path / "model.onnx", external=True)
    after = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert all(after[name] is tensor for name, tensor in before.items())


def test_no_more_than_one_lazy_tensor_is_held(tmp_path):
    size = 2**20
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
    for index in range(8):
        value = initializer(graph, f"w{index}", np.zeros(1, dtype=np.float32))
        value.const_value = ir.LazyTensor(
            lambda index=index: ir.Tensor(np.full(size, index, dtype=np.float32)),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape([size]),
        )
    tracemalloc.start()
    save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx", external=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 4 * size  # the array and its bytes


def test_a_full_disk_is_one_line_and_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write._DataFile, "_append", full)
    with pytest.raises(UserError, match=r"model\.onnx: cannot be written \(No space left") as error:
        save(model, tmp_path / "model.onnx", external=True)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_more_than_a_file_can_hold_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_PROTOBUF_LIMIT", 10_000)
    with pytest.raises(UserError, match="do not fit into one ONNX file"):
        save(model, tmp_path / "model.onnx", external=False)
    save(model, tmp_path / "model.onnx", external=True)
    assert list(tmp_path.iterdir())
