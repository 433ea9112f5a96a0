"""Rows of a quantised table, looked up with standard operators instead of GatherBlockQuantized.

onnxruntime-web has no kernel of that operator for WebAssembly in the build that has WebGPU. Codes
and scales of a row are gathered, the codes taken apart and scaled; the codes stay the bytes that
the head multiplies with, stored once. Which table a result comes from, and how it is packed, stands
with the node that makes it: no operator says it any more.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from gptopt.export.graphs import MICROSOFT, int_of, nodes_of, replace_node
from gptopt.export.passes import merge_constants

_TABLE, _BITS, _BLOCK = "gptopt.table", "gptopt.bits", "gptopt.block"
_BYTE = 8


class Lookup(NamedTuple):
    """A look-up that `unfold_lookups` wrote: the node that gives the rows, and the table's form."""

    node: ir.Node
    table: str
    bits: int
    block: int


def unfold_lookups(model: ir.Model) -> None:
    """Replace every GatherBlockQuantized of rows in blocks along their last axis, in place."""
    for node in nodes_of(model, "GatherBlockQuantized", MICROSOFT):
        _Unfolding(model, node).run()
    merge_constants(model)


def lookups(model: ir.Model) -> Iterator[Lookup]:
    """The look-ups that `unfold_lookups` wrote, as the file tells them."""
    for node in model.graph:
        if (table := lookup_table(node)) is not None:
            told = node.metadata_props
            yield Lookup(node, table, int(told[_BITS]), int(told[_BLOCK]))


def lookup_table(node: ir.Node) -> str | None:
    """The table whose rows a node gives, where `unfold_lookups` wrote it."""
    return node.metadata_props.get(_TABLE)


class _Unfolding:
    """One look-up on its way to standard operators, which go in front of it."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self._model, self._node = model, node
        self._rows, self._ids, self._scales, *zeros = node.inputs
        self._zeros = zeros[0] if zeros else None
        self._bits, self._block = int_of(node, "bits", 4), int_of(node, "block_size", 128)
        assert self._scales is not None
        assert self._scales.shape is not None
        assert self._scales.dtype is not None
        self._groups = self._scales.shape.numpy()[1]
        self._dtype = self._scales.dtype

    def run(self) -> None:
        codes = self._reshaped(self._codes(self._rows), [0, 0, self._groups, self._block])
        if self._zeros is None:
            zeros = self._number(2.0 ** (self._bits - 1))
        else:
            taken = self._codes(self._zeros)  # whole bytes: perhaps more than there are groups
            ends = [np.array([each], np.int64) for each in (0, self._groups, 2)]
            zeros = self._last_axis(self._add("Slice", taken, *map(self._constant, ends)))
        centred = self._add("Sub", codes, zeros)
        scales = self._last_axis(self._gather(self._scales))
        rows = self._reshaped(self._add("Mul", centred, scales), [0, 0, self._groups * self._block])
        made = rows.producer()
        assert made is not None
        assert self._rows is not None
        table = (self._rows.name or "").rpartition(".")[0]
        told = {_TABLE: table, _BITS: str(self._bits), _BLOCK: str(self._block)}
        made.metadata_props.update(told)
        made.name, old = self._node.name, self._node.outputs[0]
        rows.shape, rows.type, name = old.shape, old.type, old.name
        replace_node(self._model, self._node, rows)
        old.name, rows.name = None, name

    def _codes(self, table: ir.Value | None) -> ir.Value:
        """The codes (B, T, n) of bytes that hold several each, lowest bits first."""
        taken = self._add("Cast", self._gather(table), to=int(self._dtype))
        if self._bits == _BYTE:
            return taken
        # rest[i] = byte >> (i bits), so that code i is rest[i] - (rest[i + 1] << bits).
        step, rest = self._number(2.0**-self._bits), [taken]
        for _ in range(_BYTE // self._bits - 1):
            rest.append(self._add("Floor", self._add("Mul", rest[-1], step)))
        whole = self._number(2.0**self._bits)
        codes = [
            self._add("Sub", low, self._add("Mul", high, whole))
            for low, high in itertools.pairwise(rest)
        ]
        parts = [self._last_axis(each) for each in (*codes, rest[-1])]
        return self._reshaped(self._add("Concat", *parts, axis=-1), [0, 0, -1])

    def _gather(self, table: ir.Value | None) -> ir.Value:
        return self._add("Gather", table, self._ids, axis=0)

    def _reshaped(self, value: ir.Value, shape: list[int]) -> ir.Value:
        return self._add("Reshape", value, self._constant(np.array(shape, np.int64)))

    def _last_axis(self, value: ir.Value) -> ir.Value:
        return self._add("Unsqueeze", value, self._constant(np.array([-1], np.int64)))

    def _number(self, value: float) -> ir.Value:
        return self._constant(np.array(value, self._dtype.numpy()))

    def _constant(self, array: np.ndarray) -> ir.Value:
        return self._add("Constant", value=ir.tensor(array))

    def _add(self, kind: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes)  # type: ignore[arg-type]  # checked by ONNX
        self._model.graph.insert_before(self._node, node)
        return node.outputs[0]
