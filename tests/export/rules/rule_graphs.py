"""Small graphs for rules: built by hand, run before and after."""

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gptopt.export.notes import Notes
from gptopt.export.rules.rule import apply

B, T, C = 2, 3, 8


class Graph:
    """A graph under construction: `value = g.node("Add", a, b)`."""

    def __init__(self):
        self.inputs, self.nodes, self.weights, self.count = [], [], [], 0

    def input(self, name, shape, kind=ir.DataType.FLOAT):
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        self.inputs.append(value)
        return value

    def weight(self, array):
        self.count += 1
        tensor = ir.tensor(array, name=f"w{self.count}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        self.weights.append(value)
        return value

    def node(self, kind, *inputs, shape=("B", "T", C), outputs=1, domain="", **attributes):
        node = ir.node(kind, inputs, attributes, num_outputs=outputs, domain=domain)
        for index, output in enumerate(node.outputs):
            output.name = f"v{len(self.nodes)}_{index}"
            output.shape, output.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def model(self, *outputs, opset=21):
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.weights,
            opset_imports={"": opset, "com.microsoft": 1}, name="rule",
        )  # fmt: skip
        return ir.Model(graph, ir_version=10)


def run(model, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def rewrite(rule, model, feeds):
    """(how often the rule acted, outputs before, outputs after, operators after, notes)."""
    before = run(model, feeds)
    notes = Notes()
    count = apply(rule, model, notes)
    RemoveUnusedNodesPass()(model)
    after = run(model, feeds)
    return count, before, after, [node.op_type for node in model.graph], notes.entries


def assert_close(before, after, atol=2e-6):
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, atol=atol, rtol=1e-5)
