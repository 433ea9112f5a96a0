"""`gptopt bench` as a user runs it: tiny shapes, mistakes in one line, an interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")  # before what imports it: hence E402 below

from gptopt import cli  # noqa: E402
from gptopt.bench import training  # noqa: E402
from gptopt.bench.records import read_rows  # noqa: E402


def bench(capsys, *arguments):
    assert cli.main(["bench", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_quick_run_on_a_cpu_writes_rows_and_a_page(tmp_path, capsys):
    result = bench(
        capsys, "kernels", "--device", "cpu", "--quick", "--rounds", 1, "--out", tmp_path
    )
    assert "says nothing about the kernels" in result["machinery"]
    _, rows = read_rows(tmp_path / "kernels.jsonl")
    assert len(rows) == result["rows"] > 30
    assert all(row["correct"] for row in rows if "cold" in row and not row["bound"])
    assert {line["reached"] for line in result["targets"]} == {"not measured"}
    assert "<svg" not in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.md").read_text().startswith("# gptopt bench")


def test_steps_of_all_contenders_have_the_same_losses(tmp_path, capsys):
    bench(capsys, "training", "--device", "cpu", "--quick", "--rounds", 1, "--out", tmp_path)
    _, rows = read_rows(tmp_path / "training.jsonl")
    assert [row["contender"] for row in rows] == [training.OURS, training.REFERENCE]
    assert all(row["correct"] and row["tokens_per_s"] > 0 and row["mfu"] > 0 for row in rows)
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-5)
    assert rows[0]["losses"][2] < rows[0]["losses"][0]


def test_a_step_that_learns_otherwise_is_wrong(tmp_path, capsys, monkeypatch):
    real = training._own

    def bent(chosen, device, dtype, kernels, *, compiled):
        step = real(chosen, device, dtype, kernels, compiled=compiled)
        return (lambda: 1.001 * step()) if bent.armed else step

    bent.armed = False
    contenders = training._contenders

    def armed(*arguments):
        bent.armed = True
        return contenders(*arguments)

    monkeypatch.setattr(training, "_own", bent)
    monkeypatch.setattr(training, "_contenders", armed)
    bench(capsys, "training", "--device", "cpu", "--quick", "--rounds", 1, "--out", tmp_path)
    _, rows = read_rows(tmp_path / "training.jsonl")
    assert all(row["correct"] is False for row in rows)


def test_decoding_is_measured_at_both_batches(tmp_path, capsys):
    bench(capsys, "generate", "--device", "cpu", "--rounds", 1, "--out", tmp_path)
    _, rows = read_rows(tmp_path / "generate.jsonl")
    assert sorted({row["batch"] for row in rows}) == [1, 32]
    assert all(row["correct"] and row["tokens_per_s"] > 0 for row in rows)
    assert max(row["distinct_tokens"] for row in rows) >= 64


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "WHAT is required"),
        (["kernel"], "found 'kernel'"),
        (["kernels", "--only", "gemm"], "--only gemm: not an operator; choose from cross_entropy"),
        (["kernels", "--only", "ffn:d64", "--device", "cpu"], "--only ffn:d64: no such case"),
        (["training", "--only", "ffn"], "--only: names an operator of gptopt bench kernels"),
        (["kernels", "--contenders", "apex"], "--contenders apex: unknown to bench kernels"),
        (["training", "--nanogpt", "absent"], "--nanogpt absent: has no model.py"),
        (["generate", "--nanogpt", "absent"], "--nanogpt: belongs to gptopt bench training"),
        (["kernels", "--minutes", "0"], "--minutes: found '0'"),
        (["kernels", "--device", "tpu"], "--device tpu: unknown"),
        (["kernels", "--device", "cpu", "--out", "{file}"], "cannot be written"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, arguments, expected):
    (tmp_path / "file").write_text("")
    given = [word.replace("{file}", str(tmp_path / "file")) for word in arguments]
    assert cli.main(["bench", *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "gptopt: error:" in line]
    assert len(errors) == 1
    assert expected in errors[0]


def test_an_interruption_keeps_the_rows_and_draws_the_page(tmp_path):
    command = [sys.executable, "-P", "-m", "gptopt", "bench", "kernels", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--rounds", "60", "--out", str(tmp_path), "--contenders", "eager"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = tmp_path / "kernels.jsonl"
    until = time.monotonic() + 60
    while not (rows.is_file() and rows.read_text().count("\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    _, kept = read_rows(rows)
    assert kept
    assert (tmp_path / "report.html").is_file()
