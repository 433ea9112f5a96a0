"""How fast onnxruntime multiplies on this machine: what a prompt cannot be read faster than."""

import statistics
import time

import numpy as np
import numpy.typing as npt

_SIZE = 1024
_TIMES = 9


def product_rate(*, whole: bool, threads: int) -> float:
    """Multiplications and additions a second of a square product of stored weights.

    Args:
        whole: of int8, uint8 times int8; else of float32.
        threads: that share the work.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    shape = (_SIZE, _SIZE)
    x: npt.NDArray[np.generic]
    weight: npt.NDArray[np.generic]
    if whole:
        x = random.integers(0, 256, shape).astype(np.uint8)
        weight = random.integers(-64, 64, shape).astype(np.int8)
        op, taken, made = "MatMulInteger", TensorProto.UINT8, TensorProto.INT32
    else:
        x, weight = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        op, taken, made = "MatMul", TensorProto.FLOAT, TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", taken, shape)],
        [helper.make_tensor_value_info("y", made, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    taken_s = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        session.run(None, {"x": x})
        taken_s.append(time.perf_counter() - began)
    return 2.0 * _SIZE**3 / statistics.median(taken_s)
