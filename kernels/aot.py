"""Every kernel compiled for every architecture, with no GPU present: what it costs is then a fact.

    rows = compile_all(["sm_80", "sm_90", "sm_100", "gfx942"], ["layernorm", "rotary"])
    problems = [row for row in rows if row.problem]

The cases come from each operator's `aot_cases()`, with the configurations that ship.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptopt.kernels.launch import INTERPRETED, AotCase

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Shared memory that one block can have, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}

_MATRIX_UNITS = (("tcgen05.mma", "tcgen05"), ("wgmma.mma_async", "wgmma"), ("mma.sync", "mma"))


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    registers: for each thread. spill_bytes: for each thread, in local memory. shared_bytes: for
    each block. matrix: the matrix instruction in use, "" where there is none. problem: what keeps
    this kernel from being shipped, "" where nothing does.
    """

    operator: str
    kernel: str
    label: str
    arch: str
    num_warps: int
    num_stages: int
    sizes: dict[str, int]
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    matrix: str = ""
    problem: str = ""


def compile_all(
    archs: Sequence[str] = ARCHS,
    operators: Sequence[str] | None = None,
    *,
    match: str = "",
    path: Path | None = None,
    workers: int = 1,
) -> list[Row]:
    """Compile all cases of `operators` (None: of all that have kernels) for `archs`.

    Args:
        archs: "sm_80", "sm_90", "sm_100", ..., "gfx942".
        operators: names of packages, so "attention" holds attention_decode too.
        match: a regular expression that "<kernel> <label>" has to contain.
        path: also write the rows there, as JSON.
        workers: processes that compile side by side.

    Raises:
        RuntimeError: triton interprets in this process, so it cannot compile.
    """
    if INTERPRETED:
        raise RuntimeError(
            "triton interprets in this process (TRITON_INTERPRET=1), expected one that compiles: "
            "unset it and start again"
        )
    jobs = [
        (operator, index, arch)
        for operator in (compilable() if operators is None else operators)
        for index, case in enumerate(cases(operator))
        if re.search(match, f"{case.kernel.__name__} {case.label}")
        for arch in archs
        if not case.archs or arch in case.archs
    ]
    if workers == 1:
        rows = [_compile_job(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(_compile_job, *zip(*jobs, strict=True), chunksize=4))
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def compilable() -> list[str]:
    """The operators that have Triton kernels."""
    return [
        name
        for name in ("attention", "cross_entropy", "ffn", "layernorm", "rotary")
        if importlib.util.find_spec(f"gptopt.kernels.{name}.triton") is not None
    ]


def cases(operator: str) -> list[AotCase]:
    """What `operator` asks to be compiled, in a fixed order."""
    module = importlib.import_module(f"gptopt.kernels.{operator}.triton")
    return list(module.aot_cases())


def compile_case(case: AotCase, arch: str) -> Row:
    """Compile one case for one architecture; what goes wrong is the row's problem."""
    config = case.config(arch)
    facts: dict[str, Any] = {}
    try:
        with _quiet():
            compiled = triton.compile(
                _source(case, {**case.constexprs, **config.sizes}),
                target=_target(arch),
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
        facts = _facts(compiled, arch)
        problem = _problem(facts, arch)
    except Exception as error:
        problem = f"does not compile: {type(error).__name__}: {str(error).strip()[:600]}"
    return Row(
        operator=case.operator,
        kernel=case.kernel.__name__,
        label=case.label,
        arch=arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        sizes=dict(config.sizes),
        **facts,
        problem=problem,
    )


def _compile_job(operator: str, index: int, arch: str) -> Row:
    return compile_case(cases(operator)[index], arch)


def _source(case: AotCase, constexprs: dict[str, Any]) -> ASTSource:
    """The kernel with its arguments' types, as a launch would specialise it."""
    names = case.kernel.arg_names
    given = {**case.arguments, **constexprs}
    missing, unknown = set(names) - set(given), set(given) - set(names)
    assert not missing, f"{case.kernel.__name__}: nothing said of {missing}"
    assert not unknown, f"{case.kernel.__name__}: has no {unknown}"
    signature, constants, attributes = {}, dict(constexprs), {}
    for position, name in enumerate(names):
        kind = case.arguments.get(name) if name in case.arguments else "constexpr"
        if kind is None or isinstance(kind, int):
            constants[name] = kind
            kind = "constexpr"
        kind, _, divisor = kind.partition(":")
        signature[name] = kind
        if divisor == "16" or kind.startswith("*"):
            attributes[position,] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, constants, attributes)


def _target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def _facts(compiled: Any, arch: str) -> dict[str, Any]:
    if not arch.startswith("sm_"):
        return {**_hip_facts(compiled.asm["amdgcn"]), "shared_bytes": compiled.metadata.shared}
    matrix = next((name for sign, name in _MATRIX_UNITS if sign in compiled.asm["ptx"]), "")
    usage = resource_usage(compiled.asm["cubin"])
    return {
        "registers": usage["REG"],
        "spill_bytes": max(usage["STACK"], usage["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "matrix": matrix,
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a cubin with one kernel, by the cuobjdump that triton carries."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        said = subprocess.run(
            [tool, "--dump-resource-usage", str(file)], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def _hip_facts(assembly: str) -> dict[str, Any]:
    def count(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)

    return {
        "registers": count("vgpr_count"),
        "spill_bytes": 4 * (count("vgpr_spill_count") + count("sgpr_spill_count")),
        "matrix": "mfma" if "v_mfma" in assembly else "",
    }


def _problem(facts: dict[str, Any], arch: str) -> str:
    if facts["spill_bytes"]:
        return f"spills {facts['spill_bytes']} bytes of registers"
    limit = SHARED_LIMIT.get(arch)
    if limit is not None and facts["shared_bytes"] > limit:
        return f"needs {facts['shared_bytes']} bytes of shared memory, the chip has {limit}"
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The compiler writes its notes to the process's own stderr: they are no one's result."""
    sys.stderr.flush()
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
