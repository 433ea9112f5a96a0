"""Every node of a graph is looked up among the kernels that onnxruntime itself says it has.

Without this, a node that a provider cannot run is found when a client loads the file, or not at
all: onnxruntime moves it to the CPU and says so in a log. Types are followed through the graph by
onnxruntime's own operator schemas.

An onnxruntime without the provider cannot be asked. For CUDA there is kernels_cuda.json: what
get_all_opkernel_def() of onnxruntime-gpu says, read with stubs in place of the CUDA libraries, for
no GPU is needed to list kernels.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from gptopt.errors import CheckFailed
from gptopt.export.notes import Notes
from gptopt.export.targets import CUDA, Target

Types = dict[str, str]  # type variable or formal name -> "tensor(float)"

_CPU = "CPUExecutionProvider"
_STANDARD = ("", "ai.onnx")
_LISTED = Path(__file__).with_name("kernels_cuda.json")
_NEWEST = 2**31 - 1
_NAMES = {
    ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.DOUBLE: "double",
    ir.DataType.BFLOAT16: "bfloat16", ir.DataType.INT64: "int64", ir.DataType.INT32: "int32",
    ir.DataType.INT16: "int16", ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8",
    ir.DataType.UINT16: "uint16", ir.DataType.UINT32: "uint32", ir.DataType.UINT64: "uint64",
    ir.DataType.BOOL: "bool", ir.DataType.STRING: "string",
}  # fmt: skip


class Kernel(NamedTuple):
    """One kernel of a provider: versions of the operator, and types it takes."""

    first: int
    last: int
    types: dict[str, list[str]]


def check_kernels(model: ir.Model, target: Target, notes: Notes) -> None:
    """Look up every node for the target's provider.

    float16 on the CPU may lack a kernel where float32 has one: onnxruntime then casts, which is
    noted. So is a look-up in the kernels of another onnxruntime than this one.

    Raises:
        CheckFailed: a node has no kernel: its name, operator and types.
    """
    kernels = _kernels(target.provider)
    if not kernels and target.provider == CUDA:
        version, kernels = _listed()
        notes.add(
            "check", target.provider, f"kernels looked up among those of onnxruntime-gpu {version}",
            "this onnxruntime was built without the provider; nothing was run on a GPU",
        )  # fmt: skip
    types = {value: _type(value) for value in (*model.graph.inputs,)}
    types |= {value: _type(value) for value in model.graph.initializers.values()}
    for node in model.graph:
        schema = _schema(node, model)
        bound = {} if schema is None else _bind(node, schema, types)
        for value, kind in zip(node.outputs, _outputs(node, schema, bound), strict=False):
            types[value] = _type(value) or kind
        if schema is not None:
            _bind_outputs(node, schema, types, bound)
        found = kernels.get((_domain(node.domain), node.op_type), [])
        if schema is not None and _fits(found, schema.since_version, bound):
            continue
        half = {name: kind.replace("float16", "float") for name, kind in bound.items()}
        casts = target.provider == _CPU and half != bound  # only there casts are put in
        if schema is not None and casts and _fits(found, schema.since_version, half):
            notes.add(
                "check", node.op_type, "computed in float32 between casts",
                f"{target.provider} has no float16 kernel for it",
            )  # fmt: skip
            continue
        given = {types.get(value) for value in node.inputs if value is not None}
        kinds = ", ".join(sorted(kind for kind in given if kind)) or "no inputs"
        raise CheckFailed(
            f"--target {target.name}: {target.provider} has no kernel for node "
            f"{node.name or node.outputs[0].name!r}: {node.domain or 'ai.onnx'}.{node.op_type} at "
            f"opset {model.graph.opset_imports.get(node.domain)} with {kinds}; choose another "
            f"target or precision"
        )


@cache
def _kernels(provider: str) -> dict[tuple[str, str], list[Kernel]]:
    """(domain, operator) -> kernels."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[tuple[str, str], list[Kernel]] = {}
    for each in state.get_all_opkernel_def():
        if each.provider == provider:
            first, last = each.version_range
            kernel = Kernel(first, last, each.type_constraints)
            found.setdefault((_domain(each.domain), each.op_name), []).append(kernel)
    return found


@cache
def _listed() -> tuple[str, dict[tuple[str, str], list[Kernel]]]:
    """The version of onnxruntime-gpu whose CUDA kernels are listed, and they."""
    held = json.loads(_LISTED.read_text(encoding="ascii"))
    found = {}
    for name, rows in held["kernels"].items():
        domain, _, operator = name.rpartition(".")
        found[domain, operator] = [
            Kernel(first, last or _NEWEST, {
                variable: [f"tensor({kind})" for kind in kinds.split()]
                for variable, kinds in types.items()
            })
            for first, last, types in rows
        ]  # fmt: skip
    return held["onnxruntime"], found


@cache
def _schemas() -> dict[tuple[str, str], list[Any]]:
    """(domain, operator) -> schemas, newest first."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[tuple[str, str], list[Any]] = {}
    for schema in state.get_all_operator_schema():
        found.setdefault((_domain(schema.domain), schema.name), []).append(schema)
    for schemas in found.values():
        schemas.sort(key=lambda schema: -schema.since_version)
    return found


def _domain(name: str) -> str:
    return "" if name in _STANDARD else name


def _schema(node: ir.Node, model: ir.Model) -> Any | None:
    """The operator as the graph's opset has it; None where it has none."""
    opset = model.graph.opset_imports.get(node.domain, 1)
    schemas = _schemas().get((_domain(node.domain), node.op_type), [])
    return next((each for each in schemas if each.since_version <= opset), None)


def _type(value: ir.Value) -> str | None:
    kind = value.dtype
    if kind is None and value.const_value is not None:
        kind = value.const_value.dtype
    return f"tensor({_NAMES[kind]})" if kind in _NAMES else None


def _formals(given: Any, count: int) -> Iterator[Any]:
    """A formal parameter for each of `count` actual ones; the last one may repeat."""
    for index in range(count):
        yield given[min(index, len(given) - 1)] if given else None


def _bind(node: ir.Node, schema: Any, types: dict[ir.Value, str | None]) -> Types:
    """Type variables and names of inputs -> the types that this node feeds."""
    bound: Types = {}
    for value, formal in zip(node.inputs, _formals(schema.inputs, len(node.inputs)), strict=True):
        kind = None if value is None else types.get(value) or _type(value)
        if kind is not None and formal is not None:
            before = bound.setdefault(formal.typeStr, kind)
            # Inputs of one type variable that differ fit no kernel.
            bound[formal.typeStr] = kind if before == kind else f"{before} and {kind}"
            bound[formal.name] = kind
    return bound


def _bind_outputs(
    node: ir.Node, schema: Any, types: dict[ir.Value, str | None], bound: Types
) -> None:
    for value, formal in zip(
        node.outputs, _formals(schema.outputs, len(node.outputs)), strict=True
    ):
        kind = types.get(value)
        if kind is not None and formal is not None and value.name:
            bound.setdefault(formal.typeStr, kind)
            bound.setdefault(formal.name, kind)


def _outputs(node: ir.Node, schema: Any | None, bound: Types) -> Iterator[str | None]:
    """The types that a node's outputs have by its schema and attributes."""
    to = node.attributes.get("to")
    for formal in _formals(schema.outputs if schema else [], len(node.outputs)):
        if node.op_type == "Cast" and to is not None:
            yield f"tensor({_NAMES.get(ir.DataType(to.as_int()))})"
        elif formal is None:
            yield None
        else:
            text = formal.typeStr
            yield text if text.startswith("tensor(") else bound.get(text)


def _fits(kernels: list[Kernel], version: int, bound: Types) -> bool:
    """Whether a kernel takes this version of the operator and these types."""
    return any(
        kernel.first <= version <= kernel.last
        and all(bound[name] in kinds for name, kinds in kernel.types.items() if name in bound)
        for kernel in kernels
    )
