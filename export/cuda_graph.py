"""Whether onnxruntime can capture one decode step as a CUDA graph and replay it for every token.

It can where nothing is copied between host and device, no shape changes from token to token, and
every number that does change is read from device memory. With GroupQueryAttention that means: the
cache is one buffer, and attention_mask is as long as that buffer, 1 up to the newest token and 0
behind it, for the operator counts each row's tokens from it. This is told from the graph alone.
Source: onnxruntime, how its CUDA provider keeps shape arithmetic on the host.
"""

import onnx_ir as ir

from gptopt.export.contract import KEEP
from gptopt.export.graphs import MICROSOFT, nodes_of, replace_node, take_over
from gptopt.export.notes import Notes

STAGE = "cuda graph"
# Inputs that CUDA kernels read on the host, by operator; the others lie on the device.
_HOST_INPUTS: dict[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,), "CumSum": (1,), "Expand": (1,), "GroupQueryAttention": (6,),
    "Pad": (1, 2), "Range": (0, 1, 2), "ReduceSum": (1,), "Reshape": (1,), "Slice": (1, 2, 3, 4),
    "Split": (1,), "Squeeze": (1,), "Tile": (1,), "TopK": (1,), "Unsqueeze": (1,),
}  # fmt: skip


def note_cuda_graph(model: ir.Model, notes: Notes) -> None:
    """Keep the arithmetic of an optional input on the host, and note whether a step is capturable.

    The graph is changed in place and says the same.
    """
    _keep_on_host(model)
    reason = _obstacle(model)
    if reason is None:
        notes.add(
            STAGE, "decode", "a step can be captured, with attention_mask as long as the buffer",
            "no copies between host and device, no shape that changes; not tried on a GPU",
        )  # fmt: skip
    else:
        notes.add(STAGE, "decode", "a step cannot be captured", reason)


def _keep_on_host(model: ir.Model) -> None:
    """Write -n, of the optional input n, as (T - n) - T.

    Its reader wants it on the host, where onnxruntime keeps only what is computed from a shape.
    """
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    for node in nodes_of(model, "Neg"):
        keep = node.inputs[0]
        if keep is None or keep.name != KEEP:
            continue
        length = ir.node("Shape", [ids], {"start": 1, "end": 2})
        less = ir.node("Sub", [length.outputs[0], keep])
        minus = ir.node("Sub", [less.outputs[0], length.outputs[0]])
        for each in (length, less, minus):
            take_over(each.outputs[0], node.outputs[0])
        model.graph.insert_before(node, [length, less, minus])
        replace_node(model, node, minus.outputs[0])


def _obstacle(model: ir.Model) -> str | None:
    attentions = nodes_of(model, "GroupQueryAttention", MICROSOFT)
    if not attentions:
        return "the cache grows, and with it the shapes"
    if any(len(node.inputs) > 10 and node.inputs[10] is not None for node in attentions):
        return "what is added to the scores depends on the length of attention_mask"
    host: set[ir.Value] = set()
    constants = set(model.graph.initializers.values()) - set(model.graph.inputs)
    for node in model.graph:
        given = [value for value in node.inputs if value is not None]
        if given and all(value in constants for value in given):
            constants.update(node.outputs)  # computed once, when the file is loaded
        elif node.op_type == "Shape" or _runs_on_host(node, host, constants, model):
            host.update(node.outputs)
        elif reason := _copies(node, host, constants):
            return reason
    return None


def _runs_on_host(
    node: ir.Node, host: set[ir.Value], constants: set[ir.Value], model: ir.Model
) -> bool:
    """Whether onnxruntime keeps a node beside the sizes that it computes with.

    A kernel of the device that reads a size on the host anyway (Range, say) stays on the device.
    """
    known = host | constants | set(model.graph.inputs)
    given = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
    integers = all(value.dtype in (ir.DataType.INT64, ir.DataType.INT32) for _, value in given)
    sizes = [index for index, value in given if value in host]
    read = _HOST_INPUTS.get(node.op_type, ())
    near = bool(sizes) and not any(index in read for index in sizes)
    return integers and near and all(value in known for _, value in given)


def _copies(node: ir.Node, host: set[ir.Value], constants: set[ir.Value]) -> str | None:
    wanted = _HOST_INPUTS.get(node.op_type, ())
    for index, value in enumerate(node.inputs):
        if value is None or value in constants:
            continue
        if (value in host) != (index in wanted):
            way = "to the device" if value in host else "to the host"
            return f"{value.name} is copied {way} for {node.op_type}"
    return None
