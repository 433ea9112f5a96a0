"""`--budget`: what a mix of formats has to keep to, as a user says it."""

import math
import re
from dataclasses import dataclass
from typing import Literal, cast

from gptopt.errors import UserError

_FORM = re.compile(r"\s*(ppl|bytes|tokens/s)\s*=\s*([0-9]*\.?[0-9]+)\s*(%|[KMG]B)?\s*")
_UNITS = {None: 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "%": 0.01}


Kind = Literal["ppl", "bytes", "tokens/s"]


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit.

    Attributes:
        kind: "ppl": the part by which perplexity on held-out text may exceed the PyTorch model's;
            "bytes": of the file and its weights; "tokens/s": at least, decoding on this machine.
        limit: the number.
    """

    kind: Kind
    limit: float

    def __str__(self) -> str:
        """As the user would type it."""
        return f"{self.kind}={self.show(self.limit)}"

    def show(self, value: float) -> str:
        """A value of this kind."""
        if self.kind == "ppl":
            return f"{100 * value:.3g}%"
        return f"{value / 1e6:.4g}MB" if self.kind == "bytes" else f"{value:.4g}"


def parse_budget(text: str) -> Budget:
    """A budget from ppl=1%, bytes=80MB or tokens/s=300.

    Raises:
        UserError: it is none of these.
    """
    found = _FORM.fullmatch(text)
    if found is not None:
        kind, number, unit = found.groups()
        units = {"ppl": ("%",), "bytes": (None, "KB", "MB", "GB"), "tokens/s": (None,)}[kind]
        value = float(number) * _UNITS[unit]
        if unit in units and value > 0 and math.isfinite(value):
            return Budget(cast(Kind, kind), value)
    raise UserError(f"--budget {text!r}: expected one of ppl=1%, bytes=80MB, tokens/s=300")
