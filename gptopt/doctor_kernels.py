"""`gptopt doctor --kernels`: each operator's kernels proven here, or compiled for every chip."""

import importlib.util
from pathlib import Path
from typing import Any

from gptopt.config_machine import DoctorOptions
from gptopt.errors import CheckFailed, UserError
from gptopt.log import progress, say


def shipped() -> dict[str, Any] | None:
    """What the shipped configurations cost when they were compiled; None without torch.

    Returns:
        triton, the version that compiled them; current, whether it is the installed one and the
        sources are these; fresh, False; archs {arch: {kernel: {cases, problems, registers,
        spill_bytes, shared_bytes, matrix}}}, the most that any case needs.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    from gptopt.kernels import compiled

    return _summary(compiled.shipped(), fresh=False)


def compile_kernels(options: DoctorOptions) -> dict[str, Any]:
    """Compile every shipped configuration, as `shipped` with problems [text] and fresh True.

    Rows that --output has already, of the same sources and configurations, are not compiled again.

    Raises:
        UserError: triton is missing or interprets, or the table cannot be read or written.
    """
    _need_triton()
    import triton

    from gptopt.kernels import aot, compiled

    output = Path(options.output) if options.output else None
    try:
        table = compiled.Table(triton.__version__)
        if output is not None and output.exists():
            found = compiled.read(output)
            table = found if found.triton == table.triton else table
        jobs = aot.jobs(options.arch or aot.ARCHS, options.operator or None)
        known = aot.known(jobs, table)
        rows, missing = list(known.values()), [job for job in jobs if job not in known]
        try:
            with progress(len(missing), "kernels") as shown:
                for row in aot.compile_each(missing, workers=options.workers):
                    rows.append(row)
                    shown.update(1, at=f"{row.arch} {row.kernel} {row.label}")
        finally:  # an hour's work is not lost to Ctrl-C
            if output is not None and rows:
                compiled.write(output, table.updated(rows))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; choose another file") from None
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
    summary = compiled.summarise(compiled.Table(triton.__version__).updated(rows))
    problems = [
        f"{row.arch} {row.kernel} {row.label}: {row.problem}" for row in rows if row.problem
    ]
    return {**_summary(summary, fresh=True), "problems": problems}


def prove_kernels() -> dict[str, dict[str, Any]]:
    """Prove every operator's kernels against the reference on this machine, and keep the stamps.

    Returns:
        {operator: {passed, cases, worst, reason}}; passed is None where nothing can be proven, and
        reason says why.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed: doctor --kernels needs gptopt[train]")
    import torch

    from gptopt.kernels import OPERATORS, proof, select

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, dict[str, Any]] = {}
    with progress(len(OPERATORS), "operators proven") as shown:
        for operator in OPERATORS:
            obstacle = select.obstacle(operator, device)
            if obstacle is None:
                result = proof.prove(operator, device)
                proof.remember(result, device)
                found[operator] = {
                    "passed": result.passed,
                    "cases": result.cases,
                    "worst": result.worst,
                    "reason": result.reason,
                }
            else:
                found[operator] = {"passed": None, "cases": 0, "worst": None, "reason": obstacle}
            shown.update(1, last=operator)
    return found


def tune_kernels() -> dict[str, list[dict[str, Any]]]:
    """Search launch configurations on this GPU; those that are faster and right are kept.

    Raises:
        UserError: there is no GPU.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed: doctor --kernels needs gptopt[train]")
    import torch

    if not torch.cuda.is_available():
        raise UserError("--tune: times kernels on a GPU, and none is visible; leave --tune out")
    from gptopt.kernels import tuning

    return tuning.tune_all("cuda")


def show_tuned(tuned: dict[str, list[dict[str, Any]]]) -> None:
    """A line for each operator."""
    for operator, found in tuned.items():
        better = sum(result["better"] for result in found)
        say(f"{operator:<17}{len(found)} configurations searched, {better} faster ones kept")


def show_compiled(summary: dict[str, Any]) -> None:
    """A line for each architecture, and for each of its kernels where they were compiled now."""
    when = "now" if summary["fresh"] else f"by triton {summary['triton']}"
    if not summary["current"]:
        when += ", not by the installed triton from these sources"
    for arch, kernels in summary["archs"].items():
        cases = sum(kernel["cases"] for kernel in kernels.values())
        say(f"compiled     {arch}: {cases} kernels, {_most(*kernels.values())} ({when})")
        for name, kernel in kernels.items() if summary["fresh"] else ():
            matrix = ", ".join(["", *kernel["matrix"]])
            say(f"  {name:<30}{kernel['cases']:>4} kernels, {_most(kernel)}{matrix}")


def show_proofs(proofs: dict[str, dict[str, Any]]) -> None:
    """A line for each operator; one for all of them where none can be proven."""
    reasons = {proof["reason"] for proof in proofs.values() if proof["passed"] is None}
    if len(reasons) == 1 and all(proof["passed"] is None for proof in proofs.values()):
        say(f"proofs       none of {', '.join(proofs)}: {reasons.pop()}")
        return
    for operator, proof in proofs.items():
        state = {True: "proven", False: "WRONG", None: "not proven"}[proof["passed"]]
        why = proof["reason"] or f"{proof['cases']} cases, at most {proof['worst']:.0%} of budget"
        say(f"proof        {operator}: {state}: {why}")


def fail_where_wrong(report: dict[str, Any]) -> None:
    """Raise what the exit code is made from.

    Raises:
        CheckFailed: a proof failed, or a kernel that was compiled now must not be shipped.
    """
    wrong = [op for op, proof in report.get("proofs", {}).items() if proof["passed"] is False]
    if wrong:
        reason = report["proofs"][wrong[0]]["reason"]
        raise CheckFailed(
            f"the Triton kernels of {', '.join(wrong)} are wrong on this machine ({reason}); "
            "auto runs the reference body instead"
        )
    problems = (report["kernels"] or {}).get("problems", [])
    if problems:
        raise CheckFailed(
            f"{len(problems)} kernels must not be shipped, the first: {problems[0]}; "
            "change their configuration in kernels/configs"
        )


def _summary(summary: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    from gptopt.kernels import compiled

    return {
        "triton": summary["triton"],
        "current": fresh or compiled.is_current(summary, _installed_triton()),
        "fresh": fresh,
        "archs": summary["archs"],
    }


def _installed_triton() -> str | None:
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _need_triton() -> None:
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package} is not installed: doctor --kernels --compile-only needs gptopt[train]"
            )


def _most(*kernels: dict[str, Any]) -> str:
    def most(name: str) -> int:
        return int(max(kernel[name] for kernel in kernels))

    problems = sum(kernel["problems"] for kernel in kernels)
    return (
        f"at most {most('registers')} registers, {most('spill_bytes')} bytes spilled, "
        f"{most('shared_bytes') / 1024:.0f} KiB shared, {problems} problems"
    )
