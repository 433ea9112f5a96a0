"""From opset 18, the oldest that torch.onnx writes, to 17, for runtimes that know no later one."""

import onnx_ir as ir

from gptopt.export.graphs import constant_of

# Reductions whose axes became an input in opset 18; ReduceSum's did so in 13.
_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
}  # fmt: skip


def downgrade(model: ir.Model) -> None:
    """Write the few operators that changed as opset 17 has them.

    What is left and newer is found by the check against the kernel registry (registry.py).
    """
    for node in model.graph:
        if node.op_type in _REDUCTIONS and len(node.inputs) > 1:
            axes = constant_of(node.inputs[1])
            if axes is not None:
                node.resize_inputs(1)
                node.attributes.pop("noop_with_empty_axes", None)
                node.attributes.add(ir.AttrInt64s("axes", axes.numpy().tolist()))
        if node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
    model.graph.opset_imports[""] = 17
