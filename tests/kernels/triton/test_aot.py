"""Kernels compiled for chips that are not here: a short subset, and all of it under test-all.

Where triton interprets it cannot compile, so each test asks a process of its own.
"""

import json
import os
import subprocess
import sys

import pytest

from gptopt.kernels import aot
from gptopt.kernels.launch import INTERPRETED


@pytest.fixture
def compiled(tmp_path):
    """compiled(archs, operators, match): the rows, each a dict."""

    def rows(archs, operators, match=""):
        path = tmp_path / "rows.json"
        code = (
            "import json, pathlib, sys; from gptopt.kernels.aot import compile_all;"
            "archs, operators, match, path = json.loads(sys.argv[1]);"
            "compile_all(archs, operators, match=match, path=pathlib.Path(path))"
        )
        environment = {
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        }
        subprocess.run(
            [sys.executable, "-P", "-c", code, json.dumps([archs, operators, match, str(path)])],
            check=True,
            env=environment,
        )
        return json.loads(path.read_text())

    return rows


def test_the_usual_kernels_compile_for_every_chip_without_a_spill(compiled):
    usual = r"bfloat16 (C768 layer dropout|d64 r32$)"
    rows = compiled(aot.ARCHS, ["layernorm", "rotary"], usual)
    assert {row["arch"] for row in rows} == set(aot.ARCHS)
    assert {row["kernel"] for row in rows} == {
        "layernorm_fwd_kernel",
        "layernorm_bwd_kernel",
        "rotary_kernel",
    }
    assert [row for row in rows if row["problem"]] == []
    for row in rows:
        assert row["registers"] > 0
        assert row["shared_bytes"] <= aot.SHARED_LIMIT[row["arch"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operator", ["layernorm", "rotary"])
def test_every_shipped_configuration_compiles_for_every_chip_without_a_spill(compiled, operator):
    rows = compiled(aot.ARCHS, [operator])
    assert len(rows) == len(aot.ARCHS) * len(aot.cases(operator))
    assert [row for row in rows if row["problem"]] == []


@pytest.mark.parametrize("operator", aot.compilable())
def test_every_case_names_the_arguments_of_its_kernel(operator):
    for case in aot.cases(operator):
        assert case.operator.startswith(operator)
        for arch in case.archs or aot.ARCHS:
            given = {*case.arguments, *case.constexprs, *case.config(arch).sizes}
            assert given == set(case.kernel.arg_names), f"{case.kernel.__name__} {case.label}"


def test_problems_are_named():
    facts = {"spill_bytes": 16, "shared_bytes": 0}
    assert aot._problem(facts, "sm_90") == "spills 16 bytes of registers"
    facts = {"spill_bytes": 0, "shared_bytes": 170000}
    assert "170000 bytes of shared memory" in aot._problem(facts, "sm_80")
    assert aot._problem(facts, "sm_90") == ""


@pytest.mark.skipif(not INTERPRETED, reason="only where triton interprets")
def test_a_process_that_interprets_says_that_it_cannot_compile():
    with pytest.raises(RuntimeError, match="unset it and start again"):
        aot.compile_all(["sm_90"], ["rotary"])
