"""Kernels compiled for chips that are not here: a short subset, and all of it under test-all.

Where triton interprets it cannot compile, so each test asks a process of its own. What was found is
committed, bench/results/aot.json, and has to have every case as it ships.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gptopt.kernels import aot, compiled
from gptopt.kernels.compiled import Row, Table
from gptopt.kernels.launch import INTERPRETED, AotCase, Config

TABLE = Path(__file__).parents[3] / "bench" / "results" / "aot.json"


def compile_elsewhere(archs, operators, match=""):
    """The rows, from a process that does not interpret."""
    code = (
        "import json, sys; from dataclasses import asdict; from gptopt.kernels import aot;"
        "archs, operators, match = json.loads(sys.argv[1]);"
        "rows = aot.compile_all(archs, operators, match=match);"
        "print(json.dumps([asdict(row) for row in rows]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps([archs, operators, match])],
        check=True,
        stdout=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    return [Row(**row) for row in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def table():
    return compiled.read(TABLE)


def every_case():
    """(case, architecture) of all that is to be compiled."""
    for operator in aot.compilable():
        for case in aot.cases(operator):
            for arch in case.archs or aot.ARCHS:
                yield case, arch


USUAL = (
    r"^attention_(fwd|bwd_dkdv)_kernel bfloat16 d64 causal$|^attention_decode_kernel bfloat16 d64 c"
    r"|^layernorm_(fwd|bwd)_kernel bfloat16 C768 layer dropout|^rotary_kernel bfloat16 d64 r32$"
    r"|^ffn_fwd_kernel bfloat16 gelu_tanh plain ieee$|^ffn_bwd_dx_kernel bfloat16 relu2 ieee$"
    r"|^cross_entropy_(fwd|bwd)_kernel bfloat16"
)


@pytest.mark.timeout(600)
def test_the_usual_kernels_of_every_operator_compile_for_every_chip():
    rows = compile_elsewhere(aot.ARCHS, None, USUAL)
    assert {(row.package, row.arch) for row in rows} == {
        (operator, arch) for operator in aot.compilable() for arch in aot.ARCHS
    }
    assert [row for row in rows if row.problem] == []
    for row in rows:
        assert row.registers > 0
        assert row.shared_bytes <= aot.SHARED_LIMIT[row.arch]
    unit = {(row.kernel, row.arch): row.matrix for row in rows}
    for kernel in ("attention_fwd_kernel", "attention_bwd_dkdv_kernel", "ffn_bwd_dx_kernel"):
        found = [unit[kernel, arch] for arch in aot.ARCHS]
        assert found == ["mma", "wgmma", "tcgen05", "mfma"]


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("operator", aot.compilable())
def test_every_shipped_configuration_compiles_as_the_committed_table_says(operator, table):
    rows = compile_elsewhere(aot.ARCHS, [operator])
    assert len(rows) == sum(len(case.archs or aot.ARCHS) for case in aot.cases(operator))
    assert [row for row in rows if row.problem] == []
    known = table.current()
    assert [row for row in rows if known.get((row.kernel, row.label, row.arch)) != row] == []


def test_the_committed_table_has_every_case_as_it_ships_and_nothing_else(table):
    shipped = {}
    for case, arch in every_case():
        shipped[case.kernel.__name__, case.label, arch] = case.config(arch)
    assert len(shipped) == len(list(every_case())), "two cases have one name"
    found = {
        (row.kernel, row.label, row.arch): Config(row.sizes, row.num_warps, row.num_stages)
        for row in table.rows
    }
    lacking = Counter((name[0], name[2]) for name in shipped if found.get(name) != shipped[name])
    assert not lacking, "compile them: make aot"
    assert set(found) == set(shipped)


def test_the_committed_table_has_no_kernel_with_a_problem(table):
    assert [row for row in table.rows if row.problem or row.spill_bytes] == []
    for row in table.rows:
        assert row.registers > 0
        assert row.shared_bytes <= aot.SHARED_LIMIT[row.arch]


def test_the_committed_kernels_have_no_problem_on_an_nvidia_chip(table):
    assert [row for row in table.rows if row.problem and row.arch != "gfx942"] == []


def test_the_committed_kernels_use_the_matrix_unit_of_their_chip(table):
    rows = {(row.kernel, row.label, row.arch): row for row in table.rows}
    seen = Counter()
    for case, arch in every_case():
        row = rows.get((case.kernel.__name__, case.label, arch))
        if row is None or not case.dot:
            continue
        assert row.matrix, f"{row}"
        if arch == "sm_90" and case.config(arch).sizes[case.tile] >= 64:
            assert row.matrix == "wgmma", f"{row}"
            seen[row.package] += 1
    assert seen["attention"] >= 100
    assert seen["ffn"] >= 30


def test_the_summary_that_ships_is_of_the_committed_table(table):
    made = {**compiled.summarise(table), "configs": compiled.shipped()["configs"]}
    assert compiled.shipped() == made, "make aot writes both"


@pytest.mark.slow
def test_the_committed_table_is_of_the_kernels_as_they_are(table):
    assert len(table.current()) == len(table.rows), "a kernel was changed since: make aot"
    assert compiled.shipped()["configs"] == compiled.configs()


def test_a_table_is_read_as_it_was_written_and_goes_on(tmp_path):
    row = Row("rotary", "k", "a", "sm_90", 4, 1, {"N": 16}, registers=20)
    path = tmp_path / "t.json"
    compiled.write(path, Table("3.7.1").updated([row]))
    assert compiled.read(path).rows == (row,)
    other = Row("attention_decode", "d", "a", "sm_80", 4, 1, {}, registers=30, matrix="mma")
    again = Row("rotary", "k", "b", "sm_90", 4, 1, {"N": 16}, registers=40)
    both = compiled.read(path).updated([other, again])  # what it had of rotary on sm_90 is gone
    assert list(both.rows) == [other, again] == list(both.current().values())
    summary = compiled.summarise(both)["archs"]
    assert summary["sm_80"]["d"]["matrix"] == ["mma"]
    assert summary["sm_90"]["k"]["registers"] == 40


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "t.json").write_text('{"triton": "3.7.1", "columns": []}')
    with pytest.raises(ValueError, match="not a table of compiled kernels"):
        compiled.read(tmp_path / "t.json")


def test_changed_kernels_make_a_table_stale(monkeypatch):
    row = Row("rotary", "k", "a", "sm_90", 4, 1, {})
    table = Table("3.7.1").updated([row])
    summary = compiled.summarise(table)
    assert compiled.is_current(summary, "3.7.1")
    assert not compiled.is_current(summary, "3.8.0")
    monkeypatch.setattr(compiled, "sources", lambda package: "others")
    assert table.current() == {}
    assert not compiled.is_current(summary, "3.7.1")


def test_a_known_row_is_one_of_the_same_configuration():
    case = aot.cases("rotary")[0]
    config = case.config("sm_90")
    row = Row(
        "rotary",
        case.kernel.__name__,
        case.label,
        "sm_90",
        config.num_warps,
        config.num_stages,
        dict(config.sizes),
    )
    job = ("rotary", 0, "sm_90")
    assert aot.known([job], Table("3.7.1").updated([row])) == {job: row}
    other = Row(**{**row.__dict__, "num_warps": 2 * row.num_warps})
    assert aot.known([job], Table("3.7.1").updated([other])) == {}


@pytest.mark.parametrize("operator", aot.compilable())
def test_every_case_names_the_arguments_of_its_kernel(operator):
    for case in aot.cases(operator):
        assert case.operator.startswith(operator)
        for arch in case.archs or aot.ARCHS:
            given = {*case.arguments, *case.constexprs, *case.config(arch).sizes}
            assert given == set(case.kernel.arg_names), f"{case.kernel.__name__} {case.label}"


def test_problems_are_named():
    facts = {"spill_bytes": 16, "shared_bytes": 0, "matrix": "mma"}
    assert aot._problem(facts, "sm_90") == "spills 16 bytes of registers"
    facts = {"spill_bytes": 0, "shared_bytes": 170000, "matrix": "mma"}
    assert "170000 bytes of shared memory" in aot._problem(facts, "sm_80")
    assert aot._problem(facts, "sm_90") == ""
    assert "does not use wgmma" in aot._problem(facts, "sm_90", 64)
    assert aot._problem(facts, "sm_90", 32) == aot._problem(facts, "sm_100", 64) == ""
    facts = {"spill_bytes": 0, "shared_bytes": 0, "matrix": ""}
    assert "the matrix unit" in aot._problem(facts, "gfx942", 16)


def test_a_kernel_that_cannot_be_compiled_is_a_row_that_says_so():
    case = aot.cases("rotary")[0]
    broken = AotCase(
        "rotary", case.kernel, case.arguments, case.constexprs, lambda arch: Config(), "broken"
    )
    row = aot.compile_case(broken, "sm_90")  # the block sizes are missing
    assert row.problem.startswith("does not compile: ")


@pytest.mark.skipif(not INTERPRETED, reason="this process compiles")
def test_a_process_that_interprets_says_that_it_cannot_compile():
    with pytest.raises(RuntimeError, match="unset it and start again"):
        aot.compile_all(["sm_90"], ["rotary"])
