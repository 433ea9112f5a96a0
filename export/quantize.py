"""The stage that keeps weights in few bits: products and look-ups become their quantised forms.

Each stage leaves its input alone and returns another graph, so that every precision starts from the
same one. What is quantised how is the precision's business (precisions.py), the codes themselves
are made by gptopt.kernels.quantization.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor

from gptopt.export.halves import to_halves
from gptopt.export.notes import Notes
from gptopt.kernels.quantization import BLOCKS, Blocks, Method, quantize, quantize_channels
from gptopt.precisions import BlockFormat, ChannelFormat, Format, Precision

logger = logging.getLogger(__name__)

STAGE = "quantise"
_MICROSOFT = "com.microsoft"
_IDS = "input_ids"
# int8 products: without it, 2 and 8 bits have no fast kernel at all on a CPU.
_ACCURACY_LEVEL = 4


# (weight, format) -> its codes
Known = dict[tuple[str, BlockFormat], Blocks]


class Statistics(Protocol):
    """What is known of the inputs of products, by the name of the weight (see calibration.py)."""

    def moments(self, name: str) -> Tensor | None:
        """Mean squares (K,) of the inputs of a weight; None where it was never multiplied."""

    def hessian(self, name: str) -> Tensor | None:
        """Mean of x^T x over the inputs of a weight, (K, K); None where it was not multiplied."""

    def table_hessian(self, name: str) -> Tensor | None:
        """The same for a weight that is looked up as well; None where it is not both."""


def quantize_graph(
    model: ir.Model,
    precision: Precision,
    notes: Notes,
    *,
    calibration: Statistics | None = None,
    known: Known | None = None,
) -> ir.Model:
    """The graph in another precision; the given one is not changed, weights are shared with it.

    Products with a constant matrix and the look-up of the token embedding take the precision's
    formats. A tied head and its embedding get the same codes, which `write.save` stores once.
    Afterwards the floats that remain become the precision's floats.

    Args:
        model: a clean float32 graph, fused or not.
        precision: what becomes of it.
        notes: receives what could not be done as asked, and why.
        calibration: statistics of the products' inputs; without them "gptq" is "search".
        known: codes that were found before, which receives those that were not.
    """
    graph = model.clone()
    if precision.quantized:
        _Stage(graph, precision, notes, calibration, {} if known is None else known).run()
    if precision.floats == "float16":
        to_halves(graph, notes)
    return graph


@dataclass(frozen=True, slots=True)
class Product:
    """A MatMul of something with a constant matrix.

    `weight` is (K, N), or (N, K) where a Transpose node stands between.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, K)."""
        assert self.weight.shape is not None
        first, second = self.weight.shape.numpy()
        return (first, second) if self.transposed else (second, first)


def products(graph: ir.Graph) -> Iterator[Product]:
    """Every product with a constant float32 matrix."""
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        factor = node.inputs[1]
        source = None if factor is None else factor.producer()
        transposed = source is not None and _swaps_two_axes(source)
        weight = source.inputs[0] if transposed and source is not None else factor
        if weight is not None and _is_matrix(weight):
            yield Product(node, weight, transposed)


def head_of(graph: ir.Graph) -> ir.Node | None:
    """The product that makes the logits: the nearest MatMul above the first output."""
    value: ir.Value | None = graph.outputs[0]
    while value is not None:
        node = value.producer()
        if node is None or node.op_type == "MatMul":
            return node
        value = next((each for each in node.inputs if not _is_constant(each)), None)
    return None


def matrix(product: Product) -> Tensor:
    """The weight as (N, K) float32."""
    assert product.weight.const_value is not None
    array = product.weight.const_value.numpy()
    array = np.ascontiguousarray(array if product.transposed else array.T)
    # An array that may only be read, as one of a mapped file is, has no place in a tensor.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@dataclass(slots=True)
class _Stage:
    """One run over one graph."""

    model: ir.Model
    precision: Precision
    notes: Notes
    calibration: Statistics | None
    known: Known
    # weight name -> its codes: one matrix may stand in several products and look-ups.
    made: dict[str, tuple[Blocks, list[ir.Value | None]]] = field(default_factory=dict)
    channels: dict[str, list[ir.Value | None]] = field(default_factory=dict)

    def run(self) -> None:
        graph = self.model.graph
        head = head_of(graph)
        for product in products(graph):
            name = product.weight.name or ""
            if name in self.precision.overrides:
                form = self.precision.overrides[name]
            else:
                is_head = product.node is head
                form = self.precision.head if is_head else self.precision.layers
            if form is not None:
                self._product(product, form)
        if self.precision.head is not None:
            self._lookups(self.precision.head)
        common.RemoveUnusedNodesPass()(self.model)
        graph.opset_imports[_MICROSOFT] = 1

    def _product(self, product: Product, form: Format) -> None:
        N, K = product.sizes
        if isinstance(form, ChannelFormat):
            weights, kind = self._channels(product), "DynamicQuantizeMatMul"
            attributes: dict[str, int] = {}
        else:
            readers = product.weight.consumers()
            looked_up = any(looks_up_tokens(node) for node in readers)
            form = form.fitted(K, looked_up=looked_up) or form
            blocks, weights = self._blocks(product, form, looked_up=looked_up)
            kind = "MatMulNBits"
            attributes = {
                "K": K,
                "N": N,
                "bits": blocks.bits,
                "block_size": blocks.block,
                "accuracy_level": _ACCURACY_LEVEL,
            }
        last, bias = _bias_behind(product.node, N)
        inputs = [product.node.inputs[0], *weights, bias]
        while inputs[-1] is None:
            inputs.pop()
        _swap(self.model.graph, last, ir.node(kind, inputs, attributes, domain=_MICROSOFT))
        if last is not product.node:
            self.model.graph.remove(product.node, safe=True)
        logger.info("%s: %s", product.weight.name, kind)

    def _blocks(
        self, product: Product, form: BlockFormat, *, looked_up: bool
    ) -> tuple[Blocks, list[ir.Value | None]]:
        """A matrix in blocks, and MatMulNBits' inputs of it, made once."""
        name = product.weight.name or ""
        if name not in self.made:
            blocks = self.known.get((name, form))
            if blocks is None:
                blocks = self._quantize(name, matrix(product), form, looked_up)
                self.known[name, form] = blocks
            zeros = None
            if blocks.zero_points is not None:
                zeros = self._store(f"{name}.zeros", blocks.zero_points)
            self.made[name] = (
                blocks,
                [
                    self._store(f"{name}.codes", blocks.packed),
                    self._store(f"{name}.scales", blocks.scales),
                    zeros,
                    None,  # g_idx
                ],
            )
        return self.made[name]

    def _quantize(self, name: str, weight: Tensor, form: BlockFormat, looked_up: bool) -> Blocks:
        method, importance, hessian = form.method, None, None
        if self.calibration is not None and method == "gptq":
            hessian = self.calibration.table_hessian(name) if looked_up else None
            if hessian is None:
                hessian = self.calibration.hessian(name)
        if method == "gptq" and hessian is None:
            method = "search"
            where, reason = self.precision.name, "there is no calibration text"
            if self.calibration is not None:
                where, reason = name, "the model did not multiply with it in PyTorch"
            self.notes.add(STAGE, where, "searched instead of gptq", reason)
        if self.calibration is not None and method == "search":
            importance = self.calibration.moments(name)
        return quantize(
            weight, bits=form.bits, block=form.block, symmetric=form.symmetric,
            method=method, importance=importance, hessian=hessian,
        )  # fmt: skip

    def _channels(self, product: Product) -> list[ir.Value | None]:
        name = product.weight.name or ""
        if name not in self.channels:
            found = quantize_channels(matrix(product))
            codes = found.codes.T.contiguous()  # (K, N)
            self.channels[name] = [
                self._store(f"{name}.codes", codes),
                self._store(f"{name}.scales", found.scales),
                None,  # zero points are 0
            ]
        return self.channels[name]

    def _lookups(self, form: BlockFormat) -> None:
        """Token embeddings by GatherBlockQuantized, from the head's own codes where it is tied."""
        for node in list(self.model.graph):
            if not looks_up_tokens(node):
                continue
            table, ids = node.inputs
            assert table is not None
            name = table.name or ""
            blocks, inputs = self._table(node, table, form)
            if blocks is None:
                continue
            codes, scales, zeros, _ = inputs
            rows = self._store(f"{name}.rows", blocks.packed.flatten(1))
            taken = [rows, ids, scales, *([] if zeros is None else [zeros])]
            attributes = {
                "bits": blocks.bits, "block_size": blocks.block, "gather_axis": 0,
                "quantize_axis": 1,
            }  # fmt: skip
            new = ir.node("GatherBlockQuantized", taken, attributes, domain=_MICROSOFT)
            _swap(self.model.graph, node, new)
            if codes is not None and not codes.consumers():
                del self.model.graph.initializers[codes.name or ""]

    def _table(
        self, node: ir.Node, table: ir.Value, form: BlockFormat
    ) -> tuple[Blocks | None, list[ir.Value | None]]:
        assert table.shape is not None
        name, width = table.name or "", table.shape.numpy()[1]
        shared = self.made.get(name)
        if shared is not None and shared[0].columns % shared[0].block == 0:
            return shared
        fitted = form.fitted(width, looked_up=True)
        if fitted is None or shared is not None:
            twice = "stored twice: as floats, and in blocks for the head"
            self.notes.add(
                STAGE, name, twice if shared else "kept as floats",
                f"no block of {min(BLOCKS)} or more divides its width, {width}",
            )  # fmt: skip
            return None, []
        as_head = Product(node, table, transposed=True)
        method: Method = "search" if form.method == "gptq" else form.method
        # Rows that are only looked up have no inputs, and no calibration says anything of them.
        return self._blocks(as_head, replace(fitted, method=method), looked_up=True)

    def _store(self, name: str, tensor: Tensor) -> ir.Value:
        """An initializer of these bytes."""
        held = ir.Tensor(tensor.numpy(), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(held.shape), type=ir.TensorType(held.dtype), const_value=held
        )
        self.model.graph.register_initializer(value)
        return value


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer() or value.const_value is not None


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        value.is_initializer()
        and tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) == 2
    )


def _swaps_two_axes(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and (perm is None or list(perm.as_ints()) == [1, 0])


def looks_up_tokens(node: ir.Node) -> bool:
    """Whether a node looks rows of a constant table up by the tokens."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx"):
        return False
    axis = node.attributes.get("axis")
    table, ids = node.inputs
    return (
        table is not None
        and _is_matrix(table)
        and ids is not None
        and ids.name == _IDS
        and (axis is None or axis.as_int() == 0)
    )


def _bias_behind(node: ir.Node, N: int) -> tuple[ir.Node, ir.Value | None]:
    """The Add of a constant vector (N,) that follows a product, and the vector; or itself, None."""
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) != 1 or out.is_graph_output() or uses[0].node.op_type != "Add":
        return node, None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    tensor = None if other is None or not other.is_initializer() else other.const_value
    if tensor is None or tuple(tensor.shape) != (N,):
        return node, None
    return add, other


def _swap(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put a node where another one stood, under the same name and for the same readers."""
    before, after = old.outputs[0], new.outputs[0]
    after.shape, after.type = before.shape, before.type
    name, is_output = before.name, before.is_graph_output()
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=is_output)
    graph.remove(old, safe=True)
    before.name, after.name = None, name
