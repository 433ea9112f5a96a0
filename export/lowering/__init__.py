"""The second stage: a recorded program as an ONNX graph, one lowering per operator.

Operators of gptopt stand in the program as one node each and are translated by the functions of
this package; everything else a model does is translated by torch.onnx. Lowerings are written for
clarity and repeat themselves in every layer: passes.py merges what is equal.
"""

import contextlib
import copy
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import INT64
from torch.export import ExportedProgram

import gptopt
from gptopt.errors import UserError, first_line
from gptopt.export.contract import Contract
from gptopt.export.lowering import attention, ffn, gqa, layernorm, rotary, scatter
from gptopt.export.lowering.constants import embed_constants
from gptopt.export.lowering.ops import Value, ints, op
from gptopt.export.notes import Notes
from gptopt.export.targets import Target
from gptopt.export.trace import PREFIX, quiet

_OLDEST = 18  # opset that torch.onnx writes; opset17.downgrade goes below

Table = dict[Callable[..., Any], Callable[..., Any]]

_aten = torch.ops.aten

# What torch.onnx translates as it stands: nothing to take apart, nothing that writes in place.
_WHOLE = {
    operator.getitem,
    _aten._assert_tensor_metadata.default,
    _aten.add.Tensor,
    _aten.arange.start,
    _aten.arange.start_step,
    _aten.cat.default,
    _aten.cos.default,
    _aten.div.Tensor,
    _aten.embedding.default,
    _aten.exp2.default,
    _aten.linear.default,
    _aten.matmul.default,
    _aten.mul.Tensor,
    _aten.neg.default,
    _aten.permute.default,
    _aten.pow.Scalar,
    _aten.reciprocal.default,
    _aten.select.int,
    _aten.sigmoid.default,
    _aten.sin.default,
    _aten.slice.Tensor,
    _aten.softmax.int,
    _aten.split_with_sizes.default,
    _aten.stack.default,
    _aten.sub.Tensor,
    _aten.sym_size.int,
    _aten.tanh.default,
    _aten.transpose.int,
    _aten.unbind.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}


def table(target: Target) -> Table:
    """Operator -> what it becomes. cross_entropy has no ONNX body: an export ends at the logits."""
    operators = torch.ops.gptopt
    return {
        operators.attention.default: attention.lowering(target),
        operators.ffn.default: ffn.lowering(target.operators),
        operators.layernorm.default: layernorm.lowering(target.operators),
        operators.rotary.default: rotary.lowering(target.operators),
        _aten.reshape.default: _reshape,
        _aten.to.dtype: _to_dtype,
    }


def fit(program: ExportedProgram, target: Target, notes: Notes) -> Target:
    """The target as this model can use it: without an operator, or a cache, that refuses it."""
    if target.attention == "gqa":
        reason = gqa.obstacle(program, softcap=target.softcap)
        if reason is not None:
            notes.add("lower", "attention", "the standard Attention operator", reason)
            return target.growing()
    if target.attention == "scatter" and (reason := scatter.obstacle(program)) is not None:
        notes.add("lower", "cache", "no static cache", reason)
        return target.growing()
    return target


def lower(program: ExportedProgram, contract: Contract, target: Target) -> ir.Model:
    """The ONNX graph of a recorded program, its inputs and outputs named by the contract.

    Raises:
        UserError: the program holds an operation that has no ONNX form.
    """
    model = translate(program, target)
    _apply_contract(model, contract)
    return model


def translate(program: ExportedProgram, target: Target) -> ir.Model:
    """The ONNX graph of any recorded program, its sizes named by the tracer."""
    # Its notes on packages that are not installed are of no use to anyone here.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with _frozen(program), quiet():
        try:
            translations = table(target)
            exported = torch.onnx.export(
                _ready(program, translations),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=max(target.opset, _OLDEST),
                custom_translation_table=translations,
            )
        except Exception as error:
            # torch.onnx wraps whatever happens; the first cause says what was not understood.
            raise UserError(
                f"the model cannot be written as ONNX ({first_line(_root(error))}); "
                f"use gptopt's operators and ordinary PyTorch in its forward pass"
            ) from error
    assert exported is not None
    assert exported.exported_program is not None
    model: ir.Model = exported.model
    embed_constants(model, exported.exported_program)
    _name_weights(model)
    model.ir_version = target.ir_version
    model.producer_name, model.producer_version = "gptopt", gptopt.__version__
    return model


def _reshape(x: Value, shape: Sequence[INT64]) -> Value:
    """aten::reshape: torch.onnx would take a size of 0, an empty cache's, for "as it was"."""
    sizes = [ints(size) if isinstance(size, int) else op.Reshape(size, ints(-1)) for size in shape]
    return op.Reshape(x, op.Concat(*sizes, axis=0), allowzero=1)


def _to_dtype(
    x: Value,
    dtype: int,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: int | None = None,
) -> Value:
    """aten::to: a cast; what asks for the type that is there already, is cleaned away."""
    return op.Cast(x, to=dtype)


def _ready(program: ExportedProgram, translations: Table) -> ExportedProgram:
    """The program as torch.onnx gets it: where nothing is to be taken apart, a copy that says so.

    torch.onnx traces what it is given a second time to take composite operations apart, which would
    be most of an export's time.
    """
    whole = _WHOLE | translations.keys()
    called = (node.target for node in program.graph.nodes if node.op == "call_function")
    if not whole.issuperset(called):
        return program
    tensors = (*program.state_dict.values(), *program.constants.values())
    # torch.onnx writes types into what it gets, and targets share programs. Weights stay shared.
    ready = copy.deepcopy(program, {id(tensor): tensor for tensor in tensors})
    ready.run_decompositions = lambda *_: ready
    return ready


@contextlib.contextmanager
def _frozen(program: ExportedProgram) -> Iterator[None]:
    """Weights ask for no gradient meanwhile, so that no operator takes its training form."""
    trained = [parameter for parameter in program.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _name_weights(model: ir.Model) -> None:
    """Weights bear the names that the model gives them."""
    for value in list(model.graph.initializers.values()):
        if value.name is not None and value.name.startswith(PREFIX):
            value.name = value.name.removeprefix(PREFIX)


def _apply_contract(model: ir.Model, contract: Contract) -> None:
    """Name inputs, outputs and sizes; sizes that the contract does not know lose their name."""
    names: dict[str, str] = {}
    for values, dims in (
        (model.graph.inputs, contract.inputs()),
        (model.graph.outputs, contract.outputs()),
    ):
        if len(values) != len(dims):
            raise UserError(
                f"the model has {len(values)} outputs, its config asks for {len(dims)}: "
                f"scores, and (key, value) of every layer; return them all"
            )
        for value, (name, wanted) in zip(values, dims.items(), strict=True):
            assert value.shape is not None
            for found, dim in zip(value.shape, wanted, strict=True):
                if isinstance(dim, str) and isinstance(found, ir.SymbolicDim) and found.value:
                    names.setdefault(found.value, dim)  # an output may be longer than its text
            value.name, value.shape = name, ir.Shape(wanted)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                value.shape = ir.Shape(
                    dim if isinstance(dim, int) else names.get(dim.value or "")
                    for dim in value.shape
                )
