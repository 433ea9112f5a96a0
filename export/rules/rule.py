"""What a rewrite rule is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from gptopt.export.notes import Notes

STAGE = "fuse"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A pattern, a condition and what takes the pattern's place.

    Attributes:
        name: as targets name it.
        match: what the rule needs to know where a node is the last of its pattern, else None.
        refuse: why a match may not be rewritten, or None where it may.
        rewrite: puts the new nodes in the place of a match.
    """

    name: str
    match: Callable[[ir.Model, ir.Node], Any | None]
    refuse: Callable[[Any], str | None]
    rewrite: Callable[[ir.Model, Any], None]


def apply(rule: Rule, model: ir.Model, notes: Notes) -> int:
    """Rewrite every match in a graph; how many there were. What is refused is noted."""
    done = 0
    for node in list(model.graph):
        if node.graph is None:  # went with an earlier match
            continue
        found = rule.match(model, node)
        if found is None:
            continue
        reason = rule.refuse(found)
        if reason is None:
            rule.rewrite(model, found)
            done += 1
        else:
            notes.add(STAGE, node.outputs[0].name or node.op_type, f"no {rule.name}", reason)
    return done
