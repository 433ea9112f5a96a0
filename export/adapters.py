"""The stage that gives a graph room for LoRA adapters, and their files.

Behind each product that an adapter touches stands y + (x A) B, with A and B optional inputs of
rank 0 (see gptopt.runtime.adapters): it follows quantisation and fusions, so it says the same in
every precision, and without an adapter it adds nothing to any bit. onnxruntime-genai and the C, C#
and Python interfaces of onnxruntime load the files; the other clients run the base.
"""

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from gptopt.checkpoint import resolve_model
from gptopt.errors import CheckFailed, UserError, first_line
from gptopt.export.graphs import take_over
from gptopt.export.notes import Notes
from gptopt.export.targets import Target
from gptopt.export.validate import prove
from gptopt.lora import Adapter, is_adapter, load_adapter, lora_modules, put_on
from gptopt.model import GPT
from gptopt.runtime.adapters import NAME, SUFFIXES, Matrices, adapter_file
from gptopt.runtime.variants import EdgeFile

logger = logging.getLogger(__name__)

STAGE = "adapters"

# Files of these names cannot be made on Windows.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}
# Ways of playing a file that together reach every adapted product, at prefill and at decode.
_CASES = ("prefill", "decode", "left padding", "right padding", "greedy")
_PRODUCTS = ("MatMul", "MatMulNBits", "DynamicQuantizeMatMul")
_STORED = re.compile(r"\.weight(\.codes)?$")
_VERSION = 1  # of the file's content, for clients that ask


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter that an exported folder carries.

    Attributes:
        name: by which it is switched on.
        adapter: as it was read.
        matrices: of each layer what the graph multiplies with, float32; the scale is in B.
    """

    name: str
    adapter: Adapter
    matrices: Matrices

    def on(self, model: GPT) -> GPT:
        """A copy of the base with the adapter on it."""
        return put_on(copy.deepcopy(model), self.adapter).eval()


def name_adapter(name: str, adapter: Adapter, model: GPT) -> NamedAdapter:
    """An adapter under the name that it is exported with.

    Raises:
        UserError: it does not belong to the model, or the name is none.
    """
    taken = name.endswith("_fp16") or name.startswith("model") or name.lower() in _DEVICES
    if taken or not NAME.fullmatch(name):
        raise UserError(
            f"--adapter {name}: is no name for one; take up to 48 letters, digits, - and _, not "
            f"beginning with 'model' nor ending in '_fp16', and no device of Windows"
        )
    if adapter.score is not None:
        raise UserError(
            f"--adapter {name}: is a classifier's, and brings a layer that cannot be switched; "
            f"export {adapter.folder} itself, which merges it"
        )
    adapted = put_on(copy.deepcopy(model), adapter)
    return NamedAdapter(name, adapter, _matrices(adapted))


@torch.no_grad()
def _matrices(model: GPT) -> Matrices:
    """Each layer's adapter as one pair: its parts side by side in A, each in its rows of B."""
    found: Matrices = {}
    for layer, module in lora_modules(model):
        a = torch.cat(list(module.a))  # (ranks, in)
        b = a.new_zeros((a.shape[0], module.width))
        rank = 0
        for part, rows in zip(module.parts, module.b, strict=True):
            after = rank + rows.shape[1]
            b[rank:after, part.start : part.start + part.rows] = rows.T * module.scale
            rank = after
        pair = (a.T.contiguous(), b)
        found |= {layer + end: x.numpy() for end, x in zip(SUFFIXES, pair, strict=True)}
    return found


def refuse_target(target: Target) -> None:
    """Raise UserError where a target's clients cannot switch adapters."""
    if target.name == "web":
        raise UserError(
            "--adapter: onnxruntime-web feeds no optional inputs, so --target web cannot switch "
            "adapters; merge one with gptopt merge and export that, or choose --target portable"
        )


def add_slots(graph: ir.Model, adapters: Sequence[NamedAdapter], notes: Notes) -> ir.Model:
    """A copy of a graph with inputs of rank 0 for every layer that any of the adapters touches.

    Raises:
        UserError: the graph does not multiply with one of these layers by itself.
    """
    graph = graph.clone()
    sizes: dict[str, tuple[int, int]] = {}
    for each in adapters:
        for name, matrix in each.matrices.items():
            layer, _, kind = name.rpartition(".")
            if kind == "lora_A":
                sizes[layer] = (matrix.shape[0], each.matrices[f"{layer}.lora_B"].shape[1])
    places = _products(graph)
    for layer, (wide, tall) in sizes.items():
        if layer not in places:
            raise UserError(
                f"--adapter: {layer} is no product of its own in this graph, so an adapter cannot "
                f"be added to it; merge the adapter with gptopt merge and export that"
            )
        _add_slot(graph, places[layer], layer, wide, tall)
    names = ", ".join(each.name for each in adapters)
    notes.add(STAGE, f"{len(sizes)} layers", f"room for {names}", "OpenVINO reads no such graph")
    return graph


def _products(graph: ir.Model) -> dict[str, ir.Node]:
    """Layer -> the node that multiplies with its weight."""
    found = {}
    for node in graph.graph:
        weight = node.inputs[1] if node.op_type in _PRODUCTS else None
        while weight is not None and (maker := weight.producer()) is not None:
            weight = maker.inputs[0]  # a weight that is stored once may pass a Transpose
        if weight is not None and weight.name and _STORED.search(weight.name):
            found[_STORED.sub("", weight.name)] = node
    return found


def _add_slot(graph: ir.Model, product: ir.Node, layer: str, wide: int, tall: int) -> None:
    x, y = product.inputs[0], product.outputs[0]
    assert x is not None
    kind = ir.DataType.FLOAT16 if y.dtype == ir.DataType.FLOAT16 else ir.DataType.FLOAT
    rank = f"{layer}.rank"  # a symbol of its own: an adapter may leave a layer at rank 0
    slots = [
        _slot(graph, layer + SUFFIXES[0], kind, [wide, rank], (wide, 0)),
        _slot(graph, layer + SUFFIXES[1], kind, [rank, tall], (0, tall)),
    ]
    down = ir.node("MatMul", [x, slots[0]])
    up = ir.node("MatMul", [down.outputs[0], slots[1]])
    add = ir.node("Add", [y, up.outputs[0]])
    down.outputs[0].type = ir.TensorType(kind)
    down.outputs[0].shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], rank])
    for value in (up.outputs[0], add.outputs[0]):
        take_over(value, y)
    for node, name in ((down, "down"), (up, "up"), (add, "sum")):
        node.outputs[0].name = f"{layer}.lora.{name}"
    ir.convenience.replace_all_uses_with(y, add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, y)
    graph.graph.insert_after(product, [down, up, add])


def _slot(
    graph: ir.Model, name: str, kind: ir.DataType, shape: list[int | str], empty: tuple[int, int]
) -> ir.Value:
    """An optional input whose default has no elements."""
    default = ir.tensor(np.zeros(empty, kind.numpy()), name=name)
    slot = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=default)
    graph.graph.register_initializer(slot)
    graph.graph.inputs.append(slot)
    return slot


def write_adapters(folder: Path, adapters: Sequence[NamedAdapter], floats: str) -> None:
    """Write the files of adapters for graphs that compute in a type of float.

    Raises:
        UserError: a number has no place in float16, or the disk is full.
    """
    import onnxruntime

    for each in adapters:
        values = {}
        for name, matrix in each.matrices.items():
            narrow = matrix.astype(floats)
            if not np.isfinite(narrow).all():
                raise UserError(
                    f"--adapter {each.name}: {name} holds numbers too large for {floats}; export "
                    f"--precision fp32"
                )
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(narrow)
        file = onnxruntime.AdapterFormat()
        file.set_adapter_version(_VERSION)
        file.set_model_version(_VERSION)
        file.set_parameters(values)
        path = folder / adapter_file(each.name, floats)
        try:
            file.export_adapter(str(path))
        except RuntimeError as error:  # what onnxruntime makes of a full disk
            raise UserError(
                f"{path}: cannot be written ({first_line(error)}); free some space"
            ) from None


def prove_adapters(
    path: Path,
    file: EdgeFile,
    model: nn.Module,
    adapters: Sequence[NamedAdapter],
    vocab_size: int | None,
) -> dict[str, dict[str, Any]]:
    """Hold a written file, with each of its adapters on, to the model with the same adapter on.

    Args:
        path: the ONNX file, the adapters' files beside it.
        file: what is known of it.
        model: the base.
        adapters: those to prove.
        vocab_size: ids that occur in texts.

    Returns:
        Name -> the proof, for report.json.

    Raises:
        CheckFailed: a proof does not hold.
    """
    proofs = {}
    for each in adapters:
        assert isinstance(model, GPT)  # as name_adapter took it
        logger.info("%s: the proof of adapter %s", file.file, each.name)
        proof = prove(
            path, each.on(model), vocab_size=vocab_size, cases=_CASES, file=file,
            adapter=each.name,
        )  # fmt: skip
        if not proof.passed:
            raise CheckFailed(
                f"{file.file}: does not say with adapter {each.name} what the model says with it: "
                f"{proof.failure}; this is a fault of the export, please report it"
            )
        proofs[each.name] = proof.as_dict()
    return proofs


def adapters_of(text: str | None, model: GPT) -> list[NamedAdapter]:
    """What --adapter NAME=FOLDER[,NAME=FOLDER...] names, each read and held to its base.

    Raises:
        UserError: the text is of another form, or an adapter does not belong to the model.
    """
    found: dict[str, NamedAdapter] = {}
    for part in (text or "").split(","):
        name, equals, place = (each.strip() for each in part.partition("="))
        if not part.strip():
            continue
        if not equals or not place or name.lower() in {each.lower() for each in found}:
            raise UserError(
                f"--adapter {part.strip()}: expected NAME=FOLDER, comma-separated, each name once, "
                f"whatever its capitals; to export one merged into its base give it as the model"
            )
        folder = resolve_model(place)
        if not is_adapter(folder):
            raise UserError(f"--adapter {part.strip()}: {folder} holds a whole model, no adapter")
        found[name] = name_adapter(name, load_adapter(folder), model)
    return list(found.values())
