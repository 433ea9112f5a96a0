"""What every operator of a model says inside it: the recorded program, run once more step by step.

The steps bear the names of the parameters that they read, because those survive lowering, fusing
and quantising, where names of nodes do not.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional

from gptopt.export.trace import PREFIX

Key = tuple[str, str]  # what it is, and the parameter or the number that tells which one


class Feeds(NamedTuple):
    """One call of a model: ids and positions (B, T), mask (B, S), the cache of each layer."""

    name: str
    ids: Tensor
    mask: Tensor
    positions: Tensor
    past: Sequence[tuple[Tensor, Tensor]]

    def flat(self) -> list[Tensor]:
        """In the order of the program's inputs."""
        return [self.ids, self.mask, self.positions, *(x for pair in self.past for x in pair)]


@dataclass(slots=True)
class Steps:
    """Results by key; a parameter that is read several times has several, in order."""

    values: dict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    modules: dict[Key, str] = field(default_factory=dict)


def layer_of(name: str) -> int | None:
    """The number of the layer in the dotted name of a module or parameter."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


@torch.no_grad()
def record(
    program: ExportedProgram, weights: Mapping[str, Tensor], feeds: Feeds,
    tables: Mapping[str, Tensor],
) -> Steps:  # fmt: skip
    """Run a recorded program with these weights and keep what its operators say.

    Args:
        program: from `trace.trace`.
        weights: parameter -> tensor; their type is the one that it computes in.
        feeds: the inputs.
        tables: parameter -> what look-ups read, where that is not what products multiply with.
    """
    interpreter = _Recorder(program, tables)
    interpreter.run(*_arguments(program, weights, feeds))
    return interpreter.steps


def _arguments(
    program: ExportedProgram, weights: Mapping[str, Tensor], feeds: Feeds
) -> list[Tensor]:
    users, held = iter(feeds.flat()), {**program.state_dict, **program.constants}
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            found.append(next(users))
        else:
            own = weights.get(spec.target.removeprefix(PREFIX))
            found.append(held[spec.target] if own is None else own)
    return found


class _Recorder(torch.fx.Interpreter):
    """Runs the nodes of a program; each operator of gptopt leaves its steps."""

    def __init__(self, program: ExportedProgram, tables: Mapping[str, Tensor]) -> None:
        super().__init__(program.graph_module)
        self.steps = Steps()
        self._targets = {
            spec.arg.name: spec.target.removeprefix(PREFIX)
            for spec in program.graph_signature.input_specs
            if spec.target is not None
        }
        self._tables = tables
        self._attentions = 0
        self._rotaries: dict[torch.fx.Node, Any] = {}  # what each one was given
        operators = torch.ops.gptopt
        self._keep = {
            torch.ops.aten.embedding.default: self._lookup,
            torch.ops.aten.linear.default: self._linear,
            operators.ffn.default: self._ffn,
            operators.layernorm.default: self._norm,
            operators.rotary.default: self._rotary,
            operators.attention.default: self._attention,
        }

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run a node and keep what it says."""
        if n.target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it asks for the types of the recording
        result = super().run_node(n)
        if n.target is torch.ops.aten.embedding.default and self._name(n.args[0]) in self._tables:
            result = functional.embedding(
                self._value(n.args[1]), self._tables[self._name(n.args[0])]
            )
        if n.op == "call_function" and n.target in self._keep:
            schema = n.target._schema.arguments
            names = [argument.name for argument in schema]
            nodes = {**dict(zip(names, n.args, strict=False)), **n.kwargs}
            values = {name: self._value(node) for name, node in nodes.items()}
            self._keep[n.target](n, nodes, values, result)
        if n.op == "output":
            logits = result[0] if isinstance(result, (tuple, list)) else result
            self.steps.values["logits", ""].append(logits)
        return result

    def _value(self, node: Any) -> Any:
        return self.env[node] if isinstance(node, torch.fx.Node) else node

    def _name(self, node: Any) -> str:
        name: str = self._targets.get(getattr(node, "name", ""), "")
        return name

    def _add(self, at: torch.fx.Node, kind: str, which: str, value: Tensor | None) -> None:
        if value is None or not which:
            return
        stack = list((at.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        self.steps.values[kind, which].append(value)
        self.steps.modules[kind, which] = path.removeprefix(PREFIX)

    def _lookup(self, at: Any, nodes: Any, values: Any, result: Any) -> None:
        self._add(at, "look-up", self._name(nodes["weight"]), result)

    def _linear(self, at: Any, nodes: Any, values: Any, result: Any) -> None:
        self._product(at, nodes, values, values["input"], "weight", "bias")

    def _product(
        self, at: Any, nodes: Any, values: Any, x: Tensor, weight: str, bias: str
    ) -> Tensor | None:
        name, b = self._name(nodes.get(weight)), values.get(bias)
        if values.get(weight) is None:
            return None
        product = functional.linear(x, values[weight])
        self._add(at, "input", name, x)
        self._add(at, "product", name, product)
        summed = product if b is None else product + b
        self._add(at, "sum", name, summed)
        return summed

    def _ffn(self, at: Any, nodes: Any, values: Any, result: Any) -> None:
        self._product(at, nodes, values, values["x"], "weight", "bias")
        self._product(at, nodes, values, values["x"], "gate_weight", "gate_bias")
        self._add(at, "activation", self._name(nodes["weight"]), result)

    def _norm(self, at: Any, nodes: Any, values: Any, result: Any) -> None:
        name = self._name(nodes.get("weight"))
        total = values["x"] if values.get("residual") is None else result[1]
        self._add(at, "stream", name, total)
        self._add(at, "norm", name, result[0])

    def _rotary(self, at: Any, nodes: Any, values: Any, result: Any) -> None:
        self._rotaries[at] = values

    def _attention(self, at: Any, nodes: Any, values: Any, result: Any) -> None:
        which = str(self._attentions)
        self._attentions += 1
        for part in "qkv":
            self._add(at, part, which, values[part])
            source = nodes[part]
            given = self._rotaries.get(source.args[0]) if source.args else None
            if given is not None:
                self._add(at, f"unrotated {part}", which, given[part])
                self._add(at, "cosines", which, given["cos"])
                self._add(at, "sines", which, given["sin"])
        self._add(at, "attention", which, result[0])
        self._add(at, "present key", which, result[1])
        self._add(at, "present value", which, result[2])
        self._add(at, "mask", which, _bias(values))


def _bias(values: Mapping[str, Any]) -> Tensor:
    """What is added to the scores (B, H | 1, T, S), -inf where a key is hidden; float64."""
    q, past, mask = values["q"], values.get("past_k"), values.get("key_mask")
    B, T = q.shape[0], q.shape[2]
    P = 0 if past is None else past.shape[2]
    mask = torch.ones(B, P + T, dtype=torch.bool) if mask is None else mask
    order = mask.long().cumsum(1) - 1
    index = torch.arange(P + T)
    distance = order[:, None, P:, None] - order[:, None, None, :]  # (B, 1, T, S)
    seen = mask[:, None, None, :].expand(B, 1, T, P + T)
    window, docs = values.get("window"), values.get("doc_ids")
    if values.get("causal", True):
        seen = seen & (index[P:, None] >= index)
    if window is not None:
        seen = seen & (distance < window) & (distance >= 0)
    if docs is not None:
        seen = seen & (docs[:, None, P:, None] == docs[:, None, None, :])
    slopes = values.get("alibi_slopes")
    added = torch.zeros(1, dtype=torch.float64)
    if slopes is not None:
        added = -slopes.double()[None, :, None, None] * distance.abs()
    return torch.where(seen, added, -torch.inf)
