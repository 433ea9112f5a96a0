"""What clients said, as a table for people."""

from collections.abc import Sequence

from gptopt.export.clients.check import Said


def client_table(said: Sequence[Said]) -> str:
    """A line for each client and case."""
    lines = [f"{'client':<27} {'case':<14} {'tokens':>9} {'logit error':>12} {'budget':>9}"]
    for each in said:
        name = f"{each.client} {each.version or ''}".strip()
        start = f"{name:<27} {each.case:<14} "
        if each.error is not None and each.tokens == 0:
            lines.append(start + _why(each))
            continue
        agreeing = f"{each.agreeing + each.near_ties}/{each.tokens}"
        line = f"{start}{agreeing:>9} {each.max_abs_error:>12.1e} {each.budget:>9.1e}"
        lines.append(line if each.passed else f"{line}  {_why(each)}")
    return "\n".join(lines)


def _why(said: Said) -> str:
    limit = said.limit
    return f"FAILED: {said.error}" if limit is None else f"known limit: {limit.reason}"
