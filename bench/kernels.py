"""`gptopt bench kernels`: every operator beside its peers, checked, timed and held to the limit."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptopt.bench.cases import Case, cases
from gptopt.bench.checking import Judge, Verdict
from gptopt.bench.contenders import EAGER, Contender, Unavailable, contenders
from gptopt.bench.limits import Limits
from gptopt.bench.operators import Call, Inputs, Outputs, least_work, make_cotangents, make_inputs
from gptopt.bench.records import Recorder, Row
from gptopt.bench.timing import (
    Clock,
    Spread,
    Subject,
    TimeBudget,
    Timing,
    clock_of,
    device_is_lost,
    free_memory,
    measure,
    reason,
)
from gptopt.config_machine import BenchOptions
from gptopt.errors import CheckFailed
from gptopt.log import progress

logger = logging.getLogger(__name__)

PHASE_SECONDS = {"cuda": 1.0, "cpu": 0.1}


def bench_kernels(
    options: BenchOptions,
    device: torch.device,
    limits: Limits,
    recorder: Recorder,
    budget: TimeBudget,
) -> None:
    """Measure all cases that the options and the time allow; a row per contender and phase.

    Raises:
        CheckFailed: an error of a contender left the GPU unusable for this process.
    """
    wanted = cases(device, quick=options.quick, only=options.only)
    clock = clock_of(device)
    with progress(len(wanted), "cases") as shown:
        for case in wanted:
            if budget.is_spent():
                left_out = len(wanted) - wanted.index(case)
                logger.warning("--minutes is spent: %d cases are not measured", left_out)
                return
            shown.update(0, case=f"{case.operator} {case.name}")
            bench = _CaseBench(case, device, clock, limits, recorder, options, budget)
            bench.run()
            free_memory()
            shown.update(1, case=f"{case.operator} {case.name}")
            if device_is_lost(device):
                raise CheckFailed(
                    f"{case.operator} {case.name}: an error left {device} unusable for this"
                    f" process; {recorder.rows} rows are in {recorder.path}, start again for the"
                    f" rest with --append"
                )


class _CaseBench:
    """One case: its contenders built, judged, timed and written down."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        clock: Clock,
        limits: Limits,
        recorder: Recorder,
        options: BenchOptions,
        budget: TimeBudget,
    ) -> None:
        self.case, self.device, self.clock = case, device, clock
        self.limits, self.recorder = limits, recorder
        self.options, self.budget = options, budget
        self.verdicts: dict[str, Verdict] = {}
        self.unchecked = ""

    def run(self) -> None:
        case = self.case
        torch._dynamo.reset()  # one case's code must not count as a recompilation of another's
        try:
            inputs = make_inputs(case, self.device)
            cotangents = make_cotangents(case, self.device)
            judge = self._judge(inputs, cotangents)
        except Exception as error:
            self._note(None, f"the case could not be set up: {reason(error)}")
            return
        built: list[tuple[Contender, Call]] = []
        for contender in contenders(case, self.device, quick=self.options.quick):
            if self.options.contenders and contender.name not in self.options.contenders:
                continue
            call = self._build(contender, inputs, cotangents, judge)
            if call is not None:
                built.append((contender, call))
        for phase in case.phases:
            taking_part = [pair for pair in built if phase in pair[0].phases]
            self._phase(phase, taking_part, inputs, cotangents)

    def _judge(self, inputs: Inputs, cotangents: Outputs) -> Judge | None:
        """None, told in every row, where float64 does not fit this device."""
        try:
            return Judge(self.case, inputs, cotangents)
        except Exception as error:
            self.unchecked = reason(error)
            free_memory()
            return None

    def _build(
        self, contender: Contender, inputs: Inputs, cotangents: Outputs, judge: Judge | None
    ) -> Call | None:
        """The call of one contender, run and judged once; None where it cannot take part."""
        if contender.compiles and self.budget.is_spent():
            self._note(contender, "no time left to compile it")
            return None
        try:
            call = contender.build(self.case, inputs)
            with contender.around():
                outputs, gradients = _run_once(self.case, call, inputs, cotangents, contender)
            if judge is not None and not contender.bound:
                verdict = judge.judge(outputs, gradients)
                self.verdicts[contender.name] = verdict
                if not verdict.correct:
                    logger.warning(
                        "%s %s: %s is wrong, %s is %.3g times over its budget",
                        self.case.operator, self.case.name, contender.name, verdict.where,
                        verdict.share,
                    )  # fmt: skip
            return call
        except Unavailable as error:
            self._note(contender, str(error))
        except Exception as error:
            self._note(contender, reason(error))
            free_memory()
        return None

    def _note(self, contender: Contender | None, error: str) -> None:
        name = contender.name if contender else None
        self.recorder.add({**self._head(None), "contender": name, "error": error})
        logger.info("%s %s: %s: %s", self.case.operator, self.case.name, name or "all", error)

    def _head(self, phase: str | None) -> Row:
        case = self.case
        return {
            "operator": case.operator,
            "case": case.name,
            "sizes": dict(case.sizes),
            "options": dict(case.options),
            "dtype": case.dtype_name,
            "target": case.target,
            "device": self.device.type,
            "phase": phase,
        }

    def _phase(
        self,
        phase: str,
        taking_part: Sequence[tuple[Contender, Call]],
        inputs: Inputs,
        cotangents: Outputs,
    ) -> None:
        subjects = [
            _subject(self.case, phase, contender, call, inputs, cotangents)
            for contender, call in taking_part
        ]
        timings = measure(
            self.clock,
            subjects,
            seconds=PHASE_SECONDS[self.device.type],
            rounds=self.options.rounds,
        )
        rows = [
            self._row(phase, contender, timings[contender.name]) for contender, _ in taking_part
        ]
        _add_speedups(rows)
        for row in rows:
            self.recorder.add(row)

    def _row(self, phase: str, contender: Contender, timing: Timing) -> Row:
        row = {**self._head(phase), "contender": contender.name, "bound": contender.bound}
        if timing.error is not None or not timing.cold or not timing.warm:
            return {**row, "error": timing.error or "no sample was taken"}
        cold, warm = Spread.of(timing.cold), Spread.of(timing.warm)
        work = least_work(self.case, phase)
        seconds = cold.median_ms / 1e3
        verdict = self.verdicts.get(contender.name)
        return {
            **row,
            "cold": vars(cold),
            "warm": vars(warm),
            "wall_ms": Spread.of(timing.wall).median_ms,
            "host_ms": Spread.of(timing.host).median_ms,
            "peak_bytes": timing.peak_bytes,
            "flops": work.flops,
            "bytes": work.bytes,
            "tflops": work.flops / seconds / 1e12,
            "gb_per_s": work.bytes / seconds / 1e9,
            "share_of_limit": self.limits.ms(work, self.case.dtype_name) / cold.median_ms,
            "correct": None if verdict is None else verdict.correct,
            "share_of_budget": None if verdict is None else verdict.share,
            "unchecked": self.unchecked or None,
        }


def _add_speedups(rows: list[Row]) -> None:
    """Speed relative to plain eager PyTorch, for right results alone."""
    eager = next((row for row in rows if row["contender"] == EAGER and row.get("correct")), None)
    for row in rows:
        if eager is not None and row.get("correct"):
            row["speedup"] = eager["cold"]["median_ms"] / row["cold"]["median_ms"]


def _leaves(case: Case, inputs: Inputs) -> list[Tensor]:
    if "full" not in case.phases:
        return inputs.leaves
    return [leaf.detach().requires_grad_() for leaf in inputs.leaves]


def _run_once(
    case: Case, call: Call, inputs: Inputs, cotangents: Outputs, contender: Contender
) -> tuple[Outputs, Outputs]:
    """Outputs and gradients, as the judge compares them."""
    leaves = _leaves(case, inputs)
    if not cotangents:
        with torch.no_grad():
            return tuple(call(*leaves)), ()
    outputs = tuple(call(*leaves))
    gradients = torch.autograd.grad(
        outputs, _asked(contender, leaves), _weights(outputs, cotangents, contender)
    )
    return tuple(out.detach() for out in outputs), gradients


def _asked(contender: Contender, leaves: list[Tensor]) -> list[Tensor]:
    """Whose gradients are computed: the products alone have no biases."""
    return [leaf for leaf in leaves if leaf.ndim > 1] if contender.bound else leaves


def _weights(outputs: Outputs, cotangents: Outputs, contender: Contender) -> Outputs:
    # A bound has outputs of its own: their values serve as well as any.
    return tuple(out.detach() for out in outputs) if contender.bound else cotangents


def _subject(
    case: Case,
    phase: str,
    contender: Contender,
    call: Call,
    inputs: Inputs,
    cotangents: Outputs,
) -> Subject:
    leaves = _leaves(case, inputs)
    asked = _asked(contender, leaves)

    def forward(_: Any = None) -> Outputs:
        # Without gradients where training has no forward of its own: evaluation and decoding.
        grad = "backward" in case.phases or phase != "forward"
        with torch.set_grad_enabled(grad), contender.around():
            return tuple(call(*leaves))

    def backward(outputs: Outputs) -> Outputs:
        with contender.around():
            return torch.autograd.grad(outputs, asked, _weights(outputs, cotangents, contender))

    runs: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
        "forward": (forward, lambda: None),
        "backward": (backward, forward),
        "full": (lambda _: backward(forward()), lambda: None),
    }
    run, prepare = runs[phase]
    return Subject(contender.name, run, prepare)
