"""Every kernel compiled for every architecture, with no GPU present: what it costs is then a fact.

    rows = compile_all(["sm_80", "sm_90", "sm_100", "gfx942"], ["layernorm", "rotary"])
    problems = [row for row in rows if row.problem]

The cases come from each operator's `aot_cases()`, with the configurations that ship.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptopt.kernels.compiled import Row, Table
from gptopt.kernels.launch import INTERPRETED, AotCase, Config

Job = tuple[str, int, str]  # package, index of the case, architecture

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Shared memory that one block can have, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}

_MATRIX_UNITS = (("tcgen05.mma", "tcgen05"), ("wgmma.mma_async", "wgmma"), ("mma.sync", "mma"))


def compile_all(
    archs: Sequence[str] = ARCHS,
    operators: Sequence[str] | None = None,
    *,
    match: str = "",
    workers: int = 1,
) -> list[Row]:
    """All rows of `compile_each`."""
    return list(compile_each(jobs(archs, operators, match=match), workers=workers))


def jobs(
    archs: Sequence[str] = ARCHS, operators: Sequence[str] | None = None, *, match: str = ""
) -> list[Job]:
    """What there is to compile.

    Args:
        archs: "sm_80", "sm_90", "sm_100", ..., "gfx942".
        operators: names of packages, so "attention" holds attention_decode too; None is all.
        match: a regular expression that "<kernel> <label>" has to contain.
    """
    return [
        (operator, index, arch)
        for operator in (compilable() if operators is None else operators)
        for index, case in enumerate(cases(operator))
        if re.search(match, f"{case.kernel.__name__} {case.label}")
        for arch in archs
        if not case.archs or arch in case.archs
    ]


def compile_each(jobs: Sequence[Job], *, workers: int = 1) -> Iterator[Row]:
    """Compile, and give each row as it comes; what goes wrong is the row's problem.

    What was compiled is kept only in $TRITON_CACHE_DIR, where that is set: an hour of it is
    gigabytes, but a second run then takes minutes.

    Args:
        workers: processes that compile side by side.

    Raises:
        RuntimeError: triton interprets in this process, so it cannot compile.
    """
    if INTERPRETED:
        raise RuntimeError(
            "triton interprets in this process (TRITON_INTERPRET=1), expected one that compiles: "
            "unset it and start again"
        )
    if workers == 1:
        yield from (_compile_job(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(_compile_job, *zip(*jobs, strict=True), chunksize=4)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def known(jobs: Sequence[Job], table: Table) -> dict[Job, Row]:
    """Those of `jobs` that `table` has, of the same sources and with the same configuration."""
    rows, found = table.current(), {}
    for job in jobs:
        case, arch = cases(job[0])[job[1]], job[2]
        row, config = rows.get((case.kernel.__name__, case.label, arch)), case.config(arch)
        if row is not None and config == Config(row.sizes, row.num_warps, row.num_stages):
            found[job] = row
    return found


def compilable() -> list[str]:
    """The operators that have Triton kernels."""
    return [
        name
        for name in ("attention", "cross_entropy", "ffn", "layernorm", "rotary")
        if importlib.util.find_spec(f"gptopt.kernels.{name}.triton") is not None
    ]


@functools.cache
def cases(operator: str) -> list[AotCase]:
    """What `operator` asks to be compiled, in a fixed order."""
    module = importlib.import_module(f"gptopt.kernels.{operator}.triton")
    return list(module.aot_cases())


def compile_case(case: AotCase, arch: str) -> Row:
    """Compile one case for one architecture; what goes wrong is the row's problem."""
    config = case.config(arch)
    facts: dict[str, Any] = {}
    try:
        with _quiet(), _kept_nowhere():
            compiled = triton.compile(
                _source(case, {**case.constexprs, **config.sizes}),
                target=_target(arch),
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
        facts = _facts(compiled, arch)
        problem = _problem(facts, arch, config.sizes[case.tile] if case.dot else 0)
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
        # Scalar registers spill into lanes of vector registers, which costs no memory.
        "spill_bytes": count("private_segment_fixed_size"),
        "matrix": "mfma" if "v_mfma" in assembly else "",
    }


def _problem(facts: dict[str, Any], arch: str, tile: int = 0) -> str:
    """tile: rows of the matrix products that must run on the chip's matrix unit, 0 without."""
    if facts["spill_bytes"]:
        return f"spills {facts['spill_bytes']} bytes of registers"
    limit = SHARED_LIMIT.get(arch)
    if limit is not None and facts["shared_bytes"] > limit:
        return f"needs {facts['shared_bytes']} bytes of shared memory, the chip has {limit}"
    if arch == "sm_90" and tile >= 64 and facts["matrix"] != "wgmma":
        return f"does not use wgmma, with a tile of {tile} rows"
    if tile and not facts["matrix"]:
        return "does not use the matrix unit"
    return ""


@contextlib.contextmanager
def _kept_nowhere() -> Iterator[None]:
    """Let the compiler forget what it compiled, unless its cache was given a place."""
    if "TRITON_CACHE_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


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
