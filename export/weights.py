"""The weights that a graph stores beside those of the model, one by one."""

from collections.abc import Iterator
from typing import NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor, nn

from gptopt.export.graphs import MICROSOFT, nodes_of
from gptopt.export.steps import Steps
from gptopt.export.twin import CACHE_BOUND, CACHE_SCALES, Held
from gptopt.kernels.quantization import dequantize_cache, quantize_cache

_FLOATS = {ir.DataType.FLOAT: 0.0, ir.DataType.FLOAT16: 2.0**-10}  # of the largest number
_BLOCKS = {8: 0.06, 4: 0.4, 2: 1.6}  # relative error of one block, by bits: twice a matrix's bound
_COLUMNS = 32  # of a block whose size is not known


class Odd(NamedTuple):
    """A stored tensor that is not the parameter whose name it bears."""

    value: ir.Value
    name: str
    error: float
    bound: float


def strange_weights(graph: ir.Model, model: nn.Module, held: Held) -> Iterator[Odd]:
    """Every stored weight that is further from the model's than its precision explains."""
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    initializers = graph.graph.initializers
    for name, own in parameters.items():
        value = initializers.get(name)
        if value is not None and value.const_value is not None and value.dtype in _FLOATS:
            stored = torch.from_numpy(value.const_value.numpy().copy()).float()
            bound = _FLOATS[value.dtype] * float(own.abs().max())
            error = _distance(stored, own)
            if not error <= bound:
                yield Odd(value, f"stored {name}", error, bound)
    for ending, weights in (("codes", held.products), ("rows", held.tables)):
        for name, weight in weights.items():
            value = initializers.get(f"{name}.{ending}")
            if value is None or name not in parameters:
                continue
            bound = _BLOCKS[held.bits[name]]
            error = _worst_block(weight, parameters[name], held.blocks.get(name) or _COLUMNS)
            if not error <= bound:
                yield Odd(value, f"stored {name}", error, bound)


def strange_scales(graph: ir.Model, held: Held, steps: Steps) -> Iterator[tuple[ir.Node, Odd]]:
    """Every scale of an int8 cache that clips its keys or values, or is too coarse for them."""
    attentions = (node for node in nodes_of(graph, "GroupQueryAttention", MICROSOFT))
    for layer, (node, scales) in enumerate(zip(attentions, held.cache, strict=False)):
        for part, scale, place in zip("kv", scales, CACHE_SCALES, strict=True):
            value = node.inputs[place]
            for x in steps.values.get((part, str(layer)), []):
                rest = dequantize_cache(quantize_cache(x, scale), scale) - x
                error = float(rest.norm() / x.norm().clamp(min=1e-30))
                if value is not None and not error <= CACHE_BOUND:
                    yield node, Odd(value, f"scales of {value.name}", error, CACHE_BOUND)
                    break


def _distance(stored: Tensor, own: Tensor) -> float:
    """The smaller one of the two ways that a matrix may lie."""
    ways = [stored] if stored.dim() != 2 else [stored, stored.T]
    errors = [float((way - own).abs().max()) for way in ways if way.shape == own.shape]
    return min(errors, default=float("inf"))


def _worst_block(weight: Tensor, own: Tensor, block: int) -> float:
    """Largest relative error of a block of a row."""
    if weight.shape != own.shape:
        return float("inf")
    N, K = own.shape
    pad = -K % block
    difference, own = (
        nn.functional.pad(x.float(), (0, pad)).view(N, -1, block) for x in (weight - own, own)
    )
    floor = 0.25 * own.norm() / max(own[..., 0].numel(), 1) ** 0.5  # a block of nearly zeros
    return float((difference.norm(dim=-1) / own.norm(dim=-1).clamp(min=floor)).max())
