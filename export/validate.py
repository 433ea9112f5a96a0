"""The proof: an exported graph against the PyTorch model in higher precision.

One budget rules every case: the graph may be at most twice as far from the float64 model as the
same model in float32 PyTorch is, or 2e-5 of the range of the logits, whichever is more. A file of
lower precision may be twice as far as the same maths in its precision, plus one rounding band; what
is exact in it is proven apart, by a strict twin (twin.py).
"""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from torch import nn

from gptopt.config_classifier import says_next
from gptopt.export import cases as plays
from gptopt.export.next_token_proof import Chosen, prove_next_tokens
from gptopt.export.reference import Answers, Expected, Reference
from gptopt.export.stream import Claim, Growing, Shared, open_graph
from gptopt.export.trace import Exportable
from gptopt.export.twin import Held, held_by, strangest, write_strict_twin
from gptopt.runtime.adapters import adapter_file, read_matrices
from gptopt.runtime.variants import EdgeFile

logger = logging.getLogger(__name__)

_TORCH_FACTOR = 2.0
_RANGE_FACTOR = 2e-5
_HALF_BAND = 2.0**-10  # one rounding of a float16, of the range of the logits
_STRICT_CASES = ("prefill", "decode", "left padding", "right padding")
_GREEDY_TOKENS = 128


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What one case showed.

    Attributes:
        max_abs_error: largest distance of a logit from the float64 model.
        torch_error: the same of the model in PyTorch, in the file's precision.
        logit_range: largest minus smallest logit.
        band: what lower precision may add, as a part of the range; None in float32.
        positions: tokens whose logits were compared.
        first_bad: where the budget was first exceeded, or None.
        distances: from the float64 model, by position, and where each stands.
    """

    case: str
    max_abs_error: float = 0.0
    torch_error: float = 0.0
    logit_range: float = 0.0
    band: float | None = None
    positions: int = 0
    first_bad: str | None = None
    distances: list[tuple[float, str]] = field(default_factory=list, repr=False)

    @property
    def budget(self) -> float:
        """Largest error that passes."""
        if self.band is not None:
            return _TORCH_FACTOR * self.torch_error + self.band * self.logit_range
        return max(_TORCH_FACTOR * self.torch_error, _RANGE_FACTOR * self.logit_range)

    @property
    def passed(self) -> bool:
        """Whether every logit is finite and within the budget."""
        return self.first_bad is None

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        told = {**asdict(self), "budget": self.budget, "passed": self.passed}
        del told["distances"]
        return told

    def settle(self, torch_error: float) -> None:
        """Hold every position to the budget that follows from this error."""
        self.torch_error = torch_error
        bad = (where for distance, where in self.distances if not distance <= self.budget)
        self.first_bad = next(bad, None)


@dataclass(kw_only=True, slots=True)
class Greedy:
    """Greedy tokens of the graph, each compared with the float64 model on the same text so far.

    A near tie is another token whose float64 logit is within the budget of the best one.
    """

    tokens: int = 0
    agreeing: int = 0
    near_ties: int = 0
    distinct: int = 0
    first_bad: str | None = None


@dataclass(kw_only=True, slots=True)
class Proof:
    """All cases of a proof.

    Attributes:
        next_tokens: of a graph that chooses tokens itself.
        weight: of a quantised file the parameter, or part of an int8 cache, that is least like the
            model's: its name, relative error and bound.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    greedy: Greedy | None = None
    next_tokens: Chosen | None = None
    weight: tuple[str, float, float] | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every case held."""
        return self.failure is None

    @property
    def worst(self) -> Outcome:
        """The case that used most of its budget."""
        return max(self.outcomes, key=lambda each: (not each.passed, _used(each)))

    @property
    def failure(self) -> str | None:
        """The first case that did not hold, in a line: its name, the error, the budget, where."""
        if self.weight is not None and not self.weight[1] <= self.weight[2]:
            name, error, bound = self.weight
            return f"stored {name}: differs by {error:.2g} of itself, at most {bound} expected"
        for each in self.outcomes:
            if not each.passed:
                return (
                    f"{each.case}: logit error {each.max_abs_error:.2e}, budget "
                    f"{each.budget:.2e}, first exceeded at {each.first_bad}"
                )
        if self.greedy is not None and self.greedy.first_bad is not None:
            return f"greedy: another token at {self.greedy.first_bad}"
        if self.next_tokens is not None and self.next_tokens.first_bad is not None:
            return f"next_tokens, {self.next_tokens.first_bad}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """For report.json and --json."""
        return {
            "passed": self.passed,
            "max_abs_error": self.worst.max_abs_error,
            "budget": self.worst.budget,
            "worst_case": self.worst.case,
            "cases": [each.as_dict() for each in self.outcomes],
            "weight": self.weight
            and dict(zip(("name", "error", "bound"), self.weight, strict=True)),
            "greedy": None if self.greedy is None else asdict(self.greedy),
            "next_tokens": None if self.next_tokens is None else asdict(self.next_tokens),
        }


def prove(
    path: Path,
    model: nn.Module,
    *,
    vocab_size: int | None = None,
    cases: Collection[str] | None = None,
    file: EdgeFile | None = None,
    answers: Answers | None = None,
    adapter: str | None = None,
) -> Proof:
    """Compare an ONNX file with the model it was made from, in every way that clients use it.

    Args:
        path: the ONNX file.
        model: the model in float32, in evaluation mode (see `trace.Exportable`).
        vocab_size: ids that occur in texts, where the vocabulary is padded.
        cases: names of the cases to play; None is all of them.
        file: what is known of the file; none: a growing cache, padding anywhere.
        answers: what the model said in proofs of its other files, and will have said in this one.
        adapter: name of the adapter that is on, as it is on the model; its file lies beside.

    Raises:
        CheckFailed: onnxruntime refuses the file, or it does not have the contract's names.
    """
    started = time.monotonic()
    held, file = held_by(path), file or EdgeFile()
    with TemporaryDirectory(prefix="gptopt-") as scratch:
        twin = Path(scratch, "twin.onnx")
        proof = _play(path, twin, model, held, vocab_size, cases, file, answers, adapter)
    if file.tokens != "none" and (cases is None or "next token" in cases):
        config = cast(Exportable, model).config
        proof.next_tokens = prove_next_tokens(path, config, file, vocab_size)
    proof.seconds = time.monotonic() - started
    return proof


def _play(
    path: Path, twin: Path, model: nn.Module, held: Held, vocab_size: int | None,
    cases: Collection[str] | None, file: EdgeFile, answers: Answers | None, adapter: str | None,
) -> Proof:  # fmt: skip
    """All cases, on the file and, where it rounds what it computes with, on its strict twin."""
    stage = _stage(path, model, vocab_size, file, adapter)
    strict = None
    if not held.exact:
        write_strict_twin(path, twin)
        floats = file.model_copy(update={"cache_dtype": "float32"})
        strict = _stage(twin, model, vocab_size, floats, adapter, path.parent)
    reference = exact = Reference(model, causal=stage.causal, held=held, answers=answers)
    if held.half:
        exact = Reference(model, causal=stage.causal, held=held.strict())
    label = "in float32" if held.half else "unrounded inputs"
    band, proof = band_of(held), Proof()
    unrounded: list[Outcome] = []
    greedy: list[Claim] = []
    for name, case in plays.cases_of(stage).items():
        if cases is not None and name not in cases:
            continue
        claims = plays.claims_of(case, name, stage)
        _add(proof.outcomes, judge(name, claims, reference.expect(claims), band))
        if strict is not None and name in _STRICT_CASES:
            claims = plays.claims_of(case, name, strict)
            expected = exact.expect(claims, rounds=False)
            _add(unrounded, judge(f"{name} ({label})", claims, expected))
    stored = [each for each in (strangest(model, held), reference.coarsest()) if each is not None]
    proof.weight = max(stored, key=lambda each: each[1] / each[2], default=None)
    del exact  # two more copies of the model, perhaps
    if stage.causal and (cases is None or "greedy" in cases):
        tokens = min(_GREEDY_TOKENS, stage.block_size - stage.fit(4) + 1)
        greedy = plays.greedy(stage, tokens).claims
        expected = reference.expect(greedy)
        _add(proof.outcomes, judge("greedy", greedy, expected, band))
    if held.products or held.cache:
        pool(proof.outcomes)
    if greedy:
        budget = proof.outcomes[-1].budget
        proof.greedy = judge_greedy(greedy, expected, budget, stage.vocab_size)
    proof.outcomes += unrounded
    return proof


def _stage(
    path: Path, model: nn.Module, vocab_size: int | None, file: EdgeFile, adapter: str | None,
    weights: Path | None = None,
) -> plays.Stage:  # fmt: skip
    """A file in a session, ready to play; its data and adapters lie in `weights`, or beside it."""
    config = cast(Exportable, model).config
    assert config.vocab_size is not None
    session = open_graph(path, config, file, weights)
    if adapter is not None:
        name = Path(adapter_file(adapter, session.slots.dtype)).name
        beside = (weights or path.parent) / name
        session.adapter = session.prepare(read_matrices(beside, session.slots))
    growing = Growing(session)
    graph: Growing | Shared = growing
    whole: Growing | Shared = growing
    if file.cache != "growing":
        room = min(config.block_size, plays.LONGEST)
        graph, whole = Shared(session, room), Shared(session, config.block_size)
    return plays.Stage(
        graph=graph,
        whole=whole,
        growing=growing,
        padding=file.padding,
        by_column=file.cache == "shared",
        keeps=session.keeps,
        causal=says_next(config),
        vocab_size=vocab_size or config.vocab_size,
        block_size=config.block_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def band_of(held: Held) -> float | None:
    """What lower precision adds to the budget, as a part of the range; nothing in float32."""
    if held.exact:
        return None
    return _HALF_BAND if held.half else _RANGE_FACTOR


def judge(
    case: str, claims: Sequence[Claim], expected: Sequence[Expected], band: float | None = None
) -> Outcome:
    """Compare every claimed logit with the float64 model."""
    outcome = Outcome(case=case, band=band)
    low, high, torch_error = np.inf, -np.inf, 0.0
    for claim, (double, single) in zip(claims, expected, strict=True):
        low, high = min(low, float(double.min())), max(high, float(double.max()))
        torch_error = max(torch_error, float(np.abs(single - double).max()))
        distance = np.abs(claim.logits - double).max(axis=1)
        distance[~np.isfinite(claim.logits).all(axis=1)] = np.inf
        outcome.distances += [
            (float(error), f"token {claim.first + index} of row {claim.row}")
            for index, error in enumerate(distance)
        ]
    outcome.logit_range = high - low
    outcome.positions = len(outcome.distances)
    outcome.max_abs_error = max(distance for distance, _ in outcome.distances)
    outcome.settle(torch_error)
    return outcome


def pool(outcomes: Sequence[Outcome]) -> None:
    """Let the largest error of PyTorch in any case stand for all of them.

    A file that rounds its inputs to int8 makes an error of its own, of the size of PyTorch's but
    not the same one: what is rounded up here is rounded down there. The larger of two such draws
    is often more than twice the other where few positions are compared (of a single normal number
    in 3 of 10 cases), and next to never where the draws of all cases are pooled.
    """
    largest = max((each.torch_error for each in outcomes), default=0.0)
    for each in outcomes:
        each.settle(largest)


def judge_greedy(
    claims: Sequence[Claim], expected: Sequence[Expected], budget: float, vocab_size: int
) -> Greedy:
    """Compare the token that each claim makes the likeliest one."""
    result = Greedy()
    chosen: set[int] = set()
    for claim, (double, _) in zip(claims, expected, strict=True):
        mine = int(claim.logits[-1, :vocab_size].argmax())
        wanted = double[-1, :vocab_size]
        chosen.add(mine)
        result.tokens += 1
        if mine == int(wanted.argmax()):
            result.agreeing += 1
        elif wanted.max() - wanted[mine] <= budget:
            result.near_ties += 1
        elif result.first_bad is None:
            result.first_bad = f"token {len(claim.tokens)}"
    result.distinct = len(chosen)
    return result


def _add(outcomes: list[Outcome], outcome: Outcome) -> None:
    outcomes.append(outcome)
    logger.info(
        "proof of %s: error %.1e, %.1e in PyTorch", outcome.case, outcome.max_abs_error,
        outcome.torch_error,
    )  # fmt: skip


def _used(outcome: Outcome) -> float:
    return outcome.max_abs_error / outcome.budget if outcome.budget else 0.0
