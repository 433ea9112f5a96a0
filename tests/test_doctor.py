"""gptopt doctor --kernels: proofs here, kernels compiled for elsewhere, and what each says."""

import json
import subprocess
import sys
import typing

import pytest

from gptopt import cli, doctor_kernels
from gptopt.config_machine import DoctorOptions
from gptopt.kernels import aot, compiled, proof, select
from gptopt.kernels.compiled import Row

ONE = ["doctor", "--kernels", "--compile-only", "--operator", "rotary", "--arch", "sm_90"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTOPT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def two_cases(monkeypatch):
    """Rotary has two cases, and nothing is compiled that the test did not ask for."""
    cases = aot.cases("rotary")[:2]
    monkeypatch.setattr(aot, "cases", lambda operator: cases)
    return cases


def row(label="a", **facts):
    return Row("rotary", "rotary_kernel", label, "sm_90", 4, 1, {"BLOCK_T": 16}, **facts)


def test_json_says_what_each_architecture_needs(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert set(kernels["archs"]) >= {"sm_80", "sm_90", "sm_100"}
    for arch in ("sm_80", "sm_90", "sm_100"):
        for facts in kernels["archs"][arch].values():
            assert facts["cases"] > 0 < facts["registers"]
            assert facts["spill_bytes"] >= 0
            assert facts["shared_bytes"] <= aot.SHARED_LIMIT[arch]
    assert kernels["fresh"] is False
    assert kernels["triton"] == compiled.shipped()["triton"]
    assert isinstance(kernels["current"], bool)


def test_doctor_loads_no_kernels_unless_asked():
    # torch's own flop counter may import triton; the first module of ours that does is launch.
    code = (
        "import sys; from gptopt import cli; cli.main(['doctor', '--quiet']);"
        "assert 'gptopt.kernels.launch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)


def test_a_summary_of_another_triton_says_so(capsys, monkeypatch):
    other = {**compiled.shipped(), "triton": "0.0.1"}
    monkeypatch.setattr(compiled, "shipped", lambda: other)
    assert cli.main(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compiled")]
    assert len(lines) == len(other["archs"])
    assert all("by triton 0.0.1, not by the installed triton" in line for line in lines)


@pytest.mark.timeout(300)
def test_compile_only_compiles_writes_and_goes_on(tmp_path, capsys, monkeypatch, two_cases):
    path = tmp_path / "t.json"
    assert cli.main([*ONE, "--output", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["kernels"]
    facts = report["archs"]["sm_90"]["rotary_kernel"]
    assert (facts["cases"], facts["spill_bytes"]) == (2, 0)
    assert facts["registers"] > 10
    assert report["fresh"] is report["current"] is True
    assert [found.label for found in compiled.read(path).rows] == [case.label for case in two_cases]

    before = path.read_bytes()
    monkeypatch.setattr(aot, "compile_case", lambda *_: pytest.fail("compiled again"))
    assert cli.main([*ONE, "--output", str(path), "--quiet"]) == 0
    assert "rotary_kernel" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_ctrl_c_keeps_what_was_compiled(tmp_path, capsys, monkeypatch, two_cases):
    def first_only(jobs, *, workers):
        yield row("first", registers=9)
        raise KeyboardInterrupt

    monkeypatch.setattr(aot, "compile_each", first_only)
    path = tmp_path / "t.json"
    assert cli.main([*ONE, "--output", str(path)]) == 130
    assert [found.label for found in compiled.read(path).rows] == ["first"]
    assert list(tmp_path.glob("t.json*")) == [path]


def test_a_kernel_with_a_problem_fails_and_is_named(tmp_path, capsys, monkeypatch, two_cases):
    bad = row("float16 d64", spill_bytes=8, problem="spills 8 bytes of registers")
    monkeypatch.setattr(aot, "compile_each", lambda *_, **__: iter([bad]))
    assert cli.main([*ONE, "--output", str(tmp_path / "t.json")]) == 1
    out, err = capsys.readouterr()
    assert "1 problems" in out
    assert "sm_90 rotary_kernel float16 d64: spills 8 bytes of registers" in err
    assert compiled.read(tmp_path / "t.json").rows == (bad,)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compile-only"], "say --kernels --compile-only"),
        (["--kernels", "--arch", "sm_90"], "are of --kernels --compile-only"),
        (["--kernels", "--compile-only", "--arch", "sm_1"], "'sm_1'"),
    ],
)
def test_options_that_do_not_fit_are_one_line(capsys, flags, said):
    assert cli.main(["doctor", *flags]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("text", ["{", '{"triton": "3"}'])
def test_an_output_that_is_no_table_is_refused_and_kept(tmp_path, capsys, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    assert cli.main([*ONE, "--output", str(path)]) == 2
    assert "not a table of compiled kernels" in capsys.readouterr().err
    assert path.read_text() == text


def test_where_triton_interprets_nothing_is_compiled(capsys, monkeypatch, two_cases):
    monkeypatch.setattr(aot, "INTERPRETED", True)
    assert cli.main(ONE) == 2
    assert "unset it and start again" in capsys.readouterr().err


def test_without_a_gpu_one_line_says_what_is_not_proven(capsys, monkeypatch):
    monkeypatch.setattr(select, "obstacle", lambda *_: "Triton kernels need a GPU")
    assert cli.main(["doctor", "--kernels"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("proof")]
    assert len(lines) == 1
    assert all(operator in lines[0] for operator in select.OPERATORS)
    assert lines[0].endswith("Triton kernels need a GPU")


def test_proofs_are_run_and_kept(capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(select, "obstacle", lambda *_: None)
    monkeypatch.setattr(proof, "prove", lambda op, _: proof.ProofResult(op, True, 5, 0.5, ""))
    monkeypatch.setattr(proof, "remember", lambda result, _: kept.append(result.operator))
    assert cli.main(["doctor", "--kernels", "--json"]) == 0
    proofs = json.loads(capsys.readouterr().out)["proofs"]
    assert kept == list(proofs) == list(select.OPERATORS)
    assert proofs["ffn"] == {"passed": True, "cases": 5, "worst": 0.5, "reason": ""}


def test_tuning_needs_a_gpu_and_the_kernels(capsys, monkeypatch):
    assert cli.main(["doctor", "--tune"]) == 2
    assert "--tune goes with --kernels" in capsys.readouterr().err
    monkeypatch.setattr(select, "obstacle", lambda *_: "Triton kernels need a GPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["doctor", "--kernels", "--tune"]) == 2
    assert "none is visible" in capsys.readouterr().err


def test_what_was_tuned_is_said(capsys, monkeypatch):
    found = {"ffn": [{"better": True}, {"better": False}]}
    monkeypatch.setattr(select, "obstacle", lambda *_: "Triton kernels need a GPU")
    monkeypatch.setattr(doctor_kernels, "tune_kernels", lambda: found)
    assert cli.main(["doctor", "--kernels", "--tune"]) == 0
    assert "2 configurations searched, 1 faster ones kept" in capsys.readouterr().out


def test_a_failed_proof_is_exit_code_1(capsys, monkeypatch):
    def prove(operator, _):
        passed = operator != "ffn"
        return proof.ProofResult(
            operator, passed, 2, 3.0, "" if passed else "gelu: result 0 is off"
        )

    monkeypatch.setattr(select, "obstacle", lambda *_: None)
    monkeypatch.setattr(proof, "prove", prove)
    monkeypatch.setattr(proof, "remember", lambda *_: None)
    assert cli.main(["doctor", "--kernels"]) == 1
    out, err = capsys.readouterr()
    assert "ffn: WRONG: gelu: result 0 is off" in out
    assert "the Triton kernels of ffn are wrong on this machine" in err


def test_the_choices_are_those_of_the_compiler():
    fields = DoctorOptions.model_fields

    def choices(name):
        return typing.get_args(typing.get_args(fields[name].annotation)[0])

    assert choices("arch") == aot.ARCHS
    assert list(choices("operator")) == aot.compilable()


def test_what_needs_a_package_that_is_missing_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(doctor_kernels.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["doctor", "--kernels"]) == 2
    assert "gptopt[train]" in capsys.readouterr().err
