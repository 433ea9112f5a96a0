"""Whether the Triton bodies are right on this machine: proven once, and remembered in a stamp.

A stamp belongs to one GPU model, one torch, one triton and one state of the kernels' sources; where
any of them changes, the proof runs again. It lies in the user's cache directory
($GPTOPT_CACHE_DIR, else $XDG_CACHE_HOME/gptopt, else ~/.cache/gptopt), and a stamp that cannot be
read or written costs a new proof, never an error.
"""

import functools
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptopt.kernels.proof_cases import Case, cases

_log = logging.getLogger("gptopt.kernels")
_remembered: dict[tuple[str, torch.device], "ProofResult"] = {}


@dataclass(frozen=True)
class ProofResult:
    """What the proof of one operator found.

    passed: every result and gradient of every case was within the budget. cases: how many ran.
    worst: the largest share of its budget that an error took; above 1 is a failure. reason: of the
    first failure, "" where there is none.
    """

    operator: str
    passed: bool
    cases: int
    worst: float
    reason: str


def doubt(operator: str, device: torch.device, prove_now: bool = True) -> str | None:
    """Why the kernels of `operator` are not to be trusted on `device`; None where a proof holds.

    Args:
        operator: one whose kernels can run there.
        device: the GPU.
        prove_now: run the proof that is missing, said once, and store its stamp.
    """
    result = recall(operator, device)
    if result is None:
        if not prove_now:
            return "not proven on this machine yet: its first use does that"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "not proven on this machine yet, and a CUDA graph is being captured"
        _log.info("%s: proving its Triton kernels on %s, once", operator, machine(device)["name"])
        result = prove(operator, device)
        remember(result, device)
    if result.passed:
        return None
    return f"its Triton kernels are wrong on this machine: {result.reason}"


def prove(operator: str, device: torch.device) -> ProofResult:
    """Compare the Triton body of `operator` with the reference, results and gradients.

    The budget is the house's: the error against float64 is at most twice that of the reference
    body in the same dtype, plus one rounding band of the largest value.
    """
    worst, count = 0.0, 0
    # The proof is of the kernels, whatever mode its first caller is in.
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for case in cases(operator, device):
            count += 1
            try:
                share, what = _share_of_budget(case)
            except Exception as error:
                share, what = (
                    math.inf,
                    f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                )
            worst = max(worst, share)
            if not share <= 1.0:
                return ProofResult(operator, False, count, worst, f"{case.name}: {what}")
    return ProofResult(operator, True, count, worst, "")


def recall(operator: str, device: torch.device) -> ProofResult | None:
    """The result that an earlier proof left for this machine, if any."""
    if (operator, device) not in _remembered:
        result = _read(device).get(operator)
        if result is None:
            return None
        _remembered[operator, device] = result
    return _remembered[operator, device]


def remember(result: ProofResult, device: torch.device) -> None:
    """Keep a result, in this process and in the stamp of this machine."""
    _remembered[result.operator, device] = result
    path = _stamp(device)
    results = {**_read(device), result.operator: result}
    text = {
        "machine": machine(device),
        "operators": {name: asdict(found) for name, found in results.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(text, indent=1) + "\n")
    except OSError as error:
        _log.info("the proof of %s is not kept: %s", result.operator, error)


def forget(device: torch.device) -> None:
    """Remove the stamp of this machine: the next use proves again."""
    for key in [key for key in _remembered if key[1] == device]:
        del _remembered[key]
    _stamp(device).unlink(missing_ok=True)


def machine(device: torch.device) -> dict[str, str]:
    """What a proof depends on: GPU, architecture, torch, triton, sources."""
    import triton

    from gptopt.kernels.launch import arch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    return {
        "name": name,
        "arch": arch(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": _sources(),
    }


@functools.cache
def _sources() -> str:
    """sha256 over every source and table of the kernels."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.glob("configs/*.json")]):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where stamps lie."""
    own = os.environ.get("GPTOPT_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptopt"


def _stamp(device: torch.device) -> Path:
    key = hashlib.sha256(json.dumps(machine(device), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "proofs" / f"{machine(device)['arch']}-{key[:20]}.json"


def _read(device: torch.device) -> dict[str, ProofResult]:
    """The results in the stamp of this machine; none where it is missing, unreadable or broken."""
    path = _stamp(device)
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        if stamp["machine"] != machine(device):
            raise ValueError("it is of another machine")
        return {name: _result(name, found) for name, found in stamp["operators"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.info("%s is not a proof stamp (%s): proving again", path, error)
        return {}


def _result(name: str, found: dict[str, Any]) -> ProofResult:
    """An entry of a stamp: what is not plainly a result proves nothing."""
    result = ProofResult(**found)
    if result.operator != name or type(result.passed) is not bool:
        raise ValueError(f"{name} is no result")
    return result


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whoever writes at the same time."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _share_of_budget(case: Case) -> tuple[float, str]:
    """The largest error of a case as a share of what is allowed, and where it was."""
    inputs = [x.to(case.dtype) for x in case.inputs]
    exact = _run(case.function("reference"), inputs, torch.float64)
    same = _run(case.function("reference"), inputs, case.dtype)
    found = _run(case.function("triton"), inputs, case.dtype)
    eps = torch.finfo(case.dtype).eps
    sizes = [_largest(e) for e in exact]
    # A gradient that cancels to nothing is judged by the others'; a loss says nothing of them.
    first = len(exact) - len(inputs)
    floor = eps * max(sizes[first:])
    worst, where = 0.0, ""
    for i, (a, e, s) in enumerate(zip(found, exact, same, strict=True)):
        budget = 2 * _largest(s - e) + eps * sizes[i]
        if i >= first:
            budget = max(budget, floor)
        if case.dtype == torch.float32:
            budget = max(budget, 2e-5 * sizes[i])
        error = _largest(a - e)
        if not error <= worst * budget:
            worst = error / budget if math.isfinite(error) else math.inf
            where = f"result {i} has error {error:.3g}, and {budget:.3g} is allowed"
    return worst, where


def _largest(x: Tensor) -> float:
    """The largest absolute value; infinite where anything is not finite."""
    if x.numel() == 0:
        return 0.0
    return x.abs().nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def _run(function: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results, then gradients of all inputs, in float64, of inputs rounded before."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    results = [result for result in function(*leaves) if result.is_floating_point()]
    generator = torch.Generator().manual_seed(7)
    weights = [
        (torch.randint(-64, 65, result.shape, generator=generator) / 32).to(result)
        for result in results
    ]
    pairs = [(r, w) for r, w in zip(results, weights, strict=True) if r.requires_grad]
    gradients: tuple[Tensor, ...] = tuple(torch.zeros_like(leaf) for leaf in leaves)
    if pairs:
        gradients = torch.autograd.grad(
            [result for result, _ in pairs],
            leaves,
            [weight for _, weight in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    return [x.detach().double() for x in (*results, *gradients)]
