"""What a quantised file should say, and that its graph is right: two ways to hold it to account.

The weights that a file holds are put back into the PyTorch model. That model in float64 is what the
file should say; the same maths in the file's precision, inputs of products rounded to int8 as the
kernels round them, says how far off it may be. And a strict twin of the file, which computes with
the same weights but rounds no input, is held to the budget of float32, so that a graph that is
wrong by less than the rounding is caught as well.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptopt.errors import UserError
from gptopt.export.graphs import MICROSOFT, int_of, nodes_of
from gptopt.export.lookups import lookups
from gptopt.kernels.attention import reference
from gptopt.kernels.quantization import (
    Blocks,
    Channels,
    dequantize,
    dequantize_cache,
    dequantize_channels,
    quantize_cache,
)

# What quantising may do to a weight: about 1.5 times what block-wise rounding of Gaussian weights
# does, whose error a calibrated method may exceed for the sake of the products.
_WEIGHT_BOUNDS = {8: 0.03, 4: 0.2, 2: 0.8}
# What int8 may do to keys and values: ten times and more what scales of a fitting text do.
CACHE_BOUND = 0.25
_aten = torch.ops.aten
Ranges = dict[str, tuple[float, float]]
OF_READER = ".single:"  # in names of nodes that were put before the one named before it
_WHOLE = 0  # inputs of a product rounded with one scale for all of them
CACHE_SCALES = _KEY_SCALE, _VALUE_SCALE = 12, 13  # GroupQueryAttention's inputs


@dataclass(slots=True)
class Held:
    """The weights that an ONNX file holds in few bits, and its floats.

    Attributes:
        products: parameter -> the matrix (N, K) float32 that products multiply with.
        tables: parameter -> the matrix that look-ups read.
        blocks: parameter -> how inputs of its products are rounded: elements per int8 scale of a
            row, or 0 for one scale over all.
        bits: parameter -> how many bits an element has.
        half: whether the graph computes in float16.
        halves: parameters that it holds in float16.
        cache: per layer the scales of int8 keys and values, or nothing where they are floats.
    """

    products: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    half: bool = False
    halves: frozenset[str] = frozenset()
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether everything is float32."""
        return not (self.products or self.tables or self.half or self.halves or self.cache)

    def strict(self) -> "Held":
        """What the strict twin holds: the same numbers, none of them in float16."""
        return replace(self, half=False)


def held_by(path: Path) -> Held:
    """Read the weights of a file."""
    model = ir.load(path)
    held = Held()
    for node in nodes_of(model, "GroupQueryAttention", MICROSOFT):
        if len(node.inputs) > _VALUE_SCALE:
            key, value = node.inputs[_KEY_SCALE], node.inputs[_VALUE_SCALE]
            held.cache.append((_tensor(key), _tensor(value)))
    floats = [value.dtype for value in model.graph.initializers.values()]
    held.half = ir.DataType.FLOAT16 in floats
    held.halves = frozenset(
        name.removesuffix(".half")
        for name, value in model.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT16
    )
    for node in nodes_of(model, "MatMulNBits", MICROSOFT):
        name, weight = _matrix(node, node.inputs[1:4], int_of(node, "K", 0), "block_size")
        held.products[name], held.blocks[name] = weight, int_of(node, "block_size", 0)
        held.bits[name] = int_of(node, "bits", 4)
    for node in nodes_of(model, "DynamicQuantizeMatMul", MICROSOFT):
        codes, scales = (_tensor(value) for value in node.inputs[1:3])
        name = _parameter(node.inputs[1])
        held.products[name] = dequantize_channels(Channels(codes.T, scales.float()))
        held.blocks[name], held.bits[name] = _WHOLE, 8
    for node in nodes_of(model, "GatherBlockQuantized", MICROSOFT):
        rows, _, *rest = node.inputs
        name, held_rows = _matrix(node, [rows, *rest], None, "block_size")
        held.tables[name] = held_rows
        held.bits.setdefault(name, int_of(node, "bits", 4))
    for _, name, bits, block in lookups(model):
        parts = [
            model.graph.initializers.get(f"{name}.{part}") for part in ("rows", "scales", "zeros")
        ]
        held.tables[name] = _unpacked(parts, bits, block, None)
        held.bits.setdefault(name, bits)
    return held


def strangest(model: nn.Module, held: Held) -> tuple[str, float, float] | None:
    """(parameter, relative error, bound) of the weight that is least like the model's.

    The proof takes a file's weights for granted, so that they must be those of the model is checked
    apart: root mean square of the difference, as a part of that of the weight.
    """
    parameters = dict(model.named_parameters())
    found = []
    for name, weight in (*held.products.items(), *held.tables.items()):
        bound = _WEIGHT_BOUNDS[held.bits[name]]
        own = parameters.get(name)
        if own is None or own.shape != weight.shape:
            return name, math.inf, bound
        error = float((weight - own.detach()).norm() / own.detach().norm().clamp(min=1e-30))
        found.append((name, error, bound))
    return max(found, key=lambda each: each[1] / each[2], default=None)


def _matrix(node: ir.Node, inputs: Any, columns: int | None, block_name: str) -> tuple[str, Tensor]:
    """(parameter, matrix (N, K)) of codes, scales and zero points."""
    bits, block = int_of(node, "bits", 4), int_of(node, block_name, 32)
    return _parameter(inputs[0]), _unpacked(inputs, bits, block, columns)


def _unpacked(
    inputs: Sequence[ir.Value | None], bits: int, block: int, columns: int | None
) -> Tensor:
    codes, scales, *zeros = inputs
    packed = _tensor(codes)
    groups = packed.numel() // packed.shape[0] // (block * bits // 8)
    blocks = Blocks(
        packed=packed.reshape(len(packed), groups, -1),
        scales=_tensor(scales).float().reshape(len(packed), groups),
        zero_points=None if not zeros or zeros[0] is None else _tensor(zeros[0]).reshape(
            len(packed), -1
        ),
        bits=bits, block=block, columns=columns or groups * block,
    )  # fmt: skip
    return dequantize(blocks)


def _parameter(value: ir.Value | None) -> str:
    assert value is not None
    return (value.name or "").rpartition(".")[0]  # NAME.codes, NAME.rows


def _tensor(value: ir.Value | None) -> Tensor:
    assert value is not None
    assert value.const_value is not None
    return torch.from_numpy(np.array(value.const_value.numpy()))


def exact_model(model: nn.Module, held: Held) -> nn.Module:
    """A copy of the model in float64, with the weights that the file holds."""
    return _with_weights(copy.deepcopy(model), held).double()


def same_model(model: nn.Module, held: Held) -> nn.Module:
    """The model with the weights that the file holds, in the file's floats."""
    if held.exact:
        return model
    changed = _with_weights(copy.deepcopy(model), held)
    return changed.half() if held.half else changed


@torch.no_grad()
def _with_weights(model: nn.Module, held: Held) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name in held.products:
            parameter.copy_(held.products[name])
        elif name in held.tables:
            parameter.copy_(held.tables[name])
        elif name in held.halves and not held.half:
            parameter.copy_(parameter.half())
    return model


class Rounding(TorchDispatchMode):
    """Runs a model with inputs of products rounded as the file's kernels round them.

    Look-ups in a table that products know in another form read what the file's look-ups read.

    Args:
        model: the original model. copied: the one that runs, with the file's weights.
        held: what the file holds.
        inputs: whether inputs are rounded; else only look-ups are put right.
        ranges: parameter -> smallest and largest input of its products, where one scale serves all
            tokens of a call. Widened where inputs are not rounded, and used where they are: a
            client may feed the same tokens in one call or in many, and the coarsest scale that any
            of these calls can have is that of the range over all of them.
    """

    def __init__(
        self, model: nn.Module, copied: nn.Module, held: Held, *, inputs: bool, ranges: Ranges
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._inputs, self._ranges = inputs, ranges
        self._blocks: dict[tuple[int, int], tuple[str, int]] = {}
        self._tables: dict[tuple[int, int], Tensor] = {}
        originals = dict(model.named_parameters())
        for name, parameter in copied.named_parameters():
            if name in held.blocks:
                self._blocks[_place(parameter)] = name, held.blocks[name]
            if name in held.products and name not in held.tables:
                self._tables[_place(parameter)] = originals[name].detach().to(parameter.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = list(args)
        if func is _aten.embedding.default:
            args[0] = self._tables.get(_place(args[0]), args[0])
        for x, factor in _factors(func):
            name, block = self._blocks.get(_place(args[factor]), ("", None))
            if block == _WHOLE and not self._inputs:
                low, high = self._ranges.get(name, (0.0, 0.0))
                self._ranges[name] = min(low, float(args[x].min())), max(high, float(args[x].max()))
            elif block == _WHOLE:
                args[x] = _rounded_within(args[x], *self._ranges[name])
            elif block is not None and self._inputs:
                args[x] = _rounded_in_blocks(args[x], block)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def rounded_cache(
    scales: Sequence[tuple[Tensor, Tensor]], errors: dict[str, float]
) -> Iterator[None]:
    """Let every attention in turn see its keys and values as an int8 cache keeps them.

    Args:
        scales: per layer those of keys and values.
        errors: receives the largest relative error (root mean square) of each part of the cache.
    """
    plain, order = reference.attention, itertools.cycle(enumerate(scales))

    def kept(name: str, x: Tensor, scale: Tensor) -> Tensor:
        found = dequantize_cache(quantize_cache(x, scale), scale).to(x.dtype)
        error = float((found - x).norm() / x.norm().clamp(min=1e-30))
        errors[name] = max(error, errors.get(name, 0.0))
        return found

    def rounded(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        layer, (key, value) = next(order)
        k, v = kept(f"cache.{layer}.key", k, key), kept(f"cache.{layer}.value", v, value)
        return plain(q, k, v, *rest, **options)

    reference.attention = rounded
    try:
        yield
    finally:
        reference.attention = plain


def _place(weight: Tensor) -> tuple[int, int]:
    """What a weight and all views of the whole of it have in common."""
    return weight.data_ptr(), weight.numel()


def _factors(func: Any) -> Iterator[tuple[int, int]]:
    """Where a product has its factors (n, K) and (K, N)."""
    if func is _aten.mm.default:
        yield 0, 1
    elif func is _aten.addmm.default:
        yield 1, 2


def _rounded_within(x: Tensor, low: float, high: float) -> Tensor:
    """Inputs as uint8 with one scale for a range that holds 0 (DynamicQuantizeLinear)."""
    scale = max(high - low, 1e-30) / 255
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


def _rounded_in_blocks(x: Tensor, block: int) -> Tensor:
    """Inputs (n, K) as int8, a scale per block of a row (MatMulNBits with accuracy_level 4)."""
    n, K = x.shape
    padded = nn.functional.pad(x, (0, -K % block)).float().view(n, -1, block)
    scales = padded.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    rounded = (padded / scales).round().mul_(scales)
    return rounded.view(n, -1)[:, :K].to(x.dtype)


def write_strict_twin(path: Path, twin: Path) -> None:
    """Write a graph that computes with the same weights in float32 and rounds no input.

    It reads the data file of the original, wherever it lies itself (see `open_graph`).

    Raises:
        UserError: it cannot be written.
    """
    model = ir.load(path)
    _as_singles(model)
    for node in nodes_of(model, "MatMulNBits", MICROSOFT):
        node.attributes.add(ir.AttrInt64("accuracy_level", 1))
    for node in nodes_of(model, "DynamicQuantizeMatMul", MICROSOFT):
        _as_floats(model, node)
    for node in nodes_of(model, "GroupQueryAttention", MICROSOFT):
        _with_float_cache(node)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.INT8:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    save_scratch(model, twin)


def save_scratch(model: ir.Model, path: Path) -> None:
    """Write a graph that is only needed while a file is proven, without its data.

    Raises:
        UserError: it cannot be written.
    """
    try:
        ir.save(model, path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: a graph for the proof cannot be written there "
            f"({error.strerror or error}); let TMPDIR name a folder with room"
        ) from None


def _as_singles(model: ir.Model) -> None:
    """Compute in float32 with what is stored in float16."""
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes.add(ir.AttrInt64("to", int(single)))
        held = node.attributes.get("value")
        if node.op_type == "Constant" and held is not None and held.as_tensor().dtype == half:
            array = held.as_tensor().numpy().astype(np.float32)
            node.attributes.add(ir.AttrTensor("value", ir.tensor(array)))
        for output in node.outputs:
            if output.dtype == half:
                output.type = ir.TensorType(single)
    for value in list(model.graph.initializers.values()):
        if value.dtype != half or not value.uses():
            continue
        uses = list(value.uses())
        name = f"{uses[0].node.name}{OF_READER}{value.name}"
        cast = ir.node("Cast", [value], {"to": int(single)}, name=name)
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(single)
        model.graph.insert_before(model.graph[0], cast)
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == half:
            value.type = ir.TensorType(single)


def _as_floats(model: ir.Model, node: ir.Node) -> None:
    x, codes, scales, _, *bias = (*node.inputs, None)[:5]
    # Not DequantizeLinear, which onnxruntime would join with the product into an int8 one again.
    floats = ir.node("Cast", [codes], {"to": int(ir.DataType.FLOAT)})
    weight = ir.node("Mul", [floats.outputs[0], scales])
    product = ir.node("MatMul", [x, weight.outputs[0]])
    nodes = [floats, weight, product]
    if bias and bias[0] is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias[0]]))
    model.graph.insert_before(node, nodes)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=old.is_graph_output())
    name = old.name
    model.graph.remove(node, safe=True)
    old.name, new.name = None, name


def _with_float_cache(node: ir.Node) -> None:
    if len(node.inputs) <= _KEY_SCALE:
        return
    node.resize_inputs(_KEY_SCALE)
    while node.inputs and node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)
    for name in ("k_quant_type", "v_quant_type", "kv_cache_bit_width"):
        node.attributes.pop(name, None)
