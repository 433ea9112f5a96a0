"""The stage that fuses: rules that put one of a runtime's own operators in the place of several.

A rule says what it looks for, on what condition it may act (else the reason is noted), and what it
writes. Which rules run is the target's choice; every rule has a numeric test of its own.
"""

import onnx_ir.passes.common as common
from onnx_ir import Model

from gptopt.export.graphs import MICROSOFT
from gptopt.export.notes import Notes
from gptopt.export.rules import bias_gelu, last_token, packed_qkv, rotary_gqa, skip_layernorm
from gptopt.export.rules.rule import Rule, apply
from gptopt.export.targets import Target

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        rotary_gqa.RULE,
        packed_qkv.RULE,
        skip_layernorm.RULE,
        bias_gelu.RULE,
        last_token.RULE,
    )
}


def fuse(model: Model, target: Target, notes: Notes) -> Model:
    """Apply the target's rules in their order; returns the model, which is changed."""
    for name in target.rules:
        apply(RULES[name], model, notes)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.graph.opset_imports[MICROSOFT] = 1
    return model
