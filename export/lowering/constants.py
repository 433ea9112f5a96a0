"""What a forward pass computes from nothing but numbers is computed once, here, by PyTorch itself.

Frequencies of positions and slopes are such values. Folding them with another library's `pow` would
change their last bit, and a long context multiplies that bit by a thousand.
"""

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

_LIMIT = 2**20  # elements; larger results would bloat the file


def embed_constants(model: ir.Model, program: ExportedProgram) -> None:
    """Replace constant expressions of the program by their values.

    Args:
        model: the graph that `program` became; values are named after the program's nodes.
        program: the program as it was translated.
    """
    found = _evaluate(program)
    for node in list(model.graph):
        value = node.outputs[0]
        tensor = found.get(value.name or "")
        if tensor is None or len(node.outputs) > 1 or value.is_graph_output():
            continue
        constant = ir.Value(
            name=f"{value.name}.constant",
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(tensor_adapters.from_torch_dtype(tensor.dtype)),
            const_value=tensor_adapters.TorchTensor(tensor, name=f"{value.name}.constant"),
        )
        model.graph.register_initializer(constant)
        ir.convenience.replace_all_uses_with(value, constant)


def _evaluate(program: ExportedProgram) -> dict[str, Tensor]:
    """The tensors that depend on no input and no parameter: node name -> value."""
    signature = program.graph_signature
    held = {**program.constants, **dict(program.named_buffers())}
    buffers = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    known: dict[Node, Tensor] = {}
    for node in program.graph.nodes:
        tensor = held.get(buffers.get(node.name, ""))
        if node.op == "placeholder" and isinstance(tensor, Tensor) and tensor.numel() <= _LIMIT:
            known[node] = tensor
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        fake = node.meta.get("val")
        if not isinstance(fake, Tensor) or not _is_small(fake):
            continue
        if all(source in known for source in node.all_input_nodes):
            args = map_arg(node.args, lambda source: known[source])
            kwargs = map_arg(node.kwargs, lambda source: known[source])
            result = node.target(*args, **kwargs)
            known[node] = result.detach().clone().contiguous()
    return {node.name: tensor for node, tensor in known.items() if node.op != "placeholder"}


def _is_small(fake: Tensor) -> bool:
    return all(type(size) is int for size in fake.shape) and fake.numel() <= _LIMIT
