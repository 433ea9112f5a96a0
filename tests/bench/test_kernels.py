"""Rows of every operator, and no speed told of a wrong result."""

import json

import pytest

torch = pytest.importorskip("torch")  # before what imports it: hence E402 below

from gptopt.bench import kernels as module  # noqa: E402
from gptopt.bench.cases import OPERATORS, Case, cases  # noqa: E402
from gptopt.bench.checking import Judge  # noqa: E402
from gptopt.bench.contenders import (  # noqa: E402
    BOUND,
    EAGER,
    LIGER,
    NAMES,
    OURS,
    Contender,
    contenders,
)
from gptopt.bench.limits import Limits, Work  # noqa: E402
from gptopt.bench.operators import (  # noqa: E402
    least_work,
    make_cotangents,
    make_inputs,
    own_call,
)
from gptopt.bench.records import Recorder, read_rows  # noqa: E402
from gptopt.bench.timing import TimeBudget  # noqa: E402
from gptopt.config_machine import BenchOptions  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LIMITS = Limits(1e10, {"float32": 1e10})


def run(folder, only, **options):
    chosen = BenchOptions(what="kernels", device="cpu", quick=True, only=only, rounds=2, **options)
    with Recorder(folder, "kernels", CPU, LIMITS, append=False) as recorder:
        module.bench_kernels(chosen, CPU, LIMITS, recorder, TimeBudget(options.get("minutes")))
    return read_rows(folder / "kernels.jsonl")


@pytest.mark.parametrize("case", cases(CPU, quick=False, only=[]), ids=lambda c: c.name)
def test_every_contender_computes_what_the_operator_means(case):
    inputs, cotangents = make_inputs(case, CPU), make_cotangents(case, CPU)
    judge = Judge(case, inputs, cotangents)
    judged = 0
    for contender in contenders(case, CPU, quick=True):
        if contender.bound or contender.name == LIGER or "cuDNN" in contender.name:
            continue
        call = contender.build(case, inputs)
        verdict = judge.judge(*module._run_once(case, call, inputs, cotangents, contender))
        assert verdict.correct, (contender.name, verdict)
        judged += 1
    assert judged >= 2


@pytest.mark.parametrize("case", cases(CPU, quick=True, only=[]), ids=lambda c: c.operator)
def test_a_small_error_in_any_result_is_wrong(case):
    inputs, cotangents = make_inputs(case, CPU), make_cotangents(case, CPU)
    judge = Judge(case, inputs, cotangents)
    ours = Contender(OURS, lambda case, inputs: own_call(case, inputs, "reference"))
    call = ours.build(case, inputs)
    outputs, gradients = module._run_once(case, call, inputs, cotangents, ours)
    assert judge.judge(outputs, gradients).correct
    for i in range(len(outputs) + len(gradients)):
        found = [x.contiguous().clone() for x in (*outputs, *gradients)]
        found[i].reshape(-1)[0] += 1e-3 * found[i].abs().max()
        bent = judge.judge(tuple(found[: len(outputs)]), tuple(found[len(outputs) :]))
        assert not bent.correct, i
    poisoned = tuple(torch.full_like(x, float("nan")) for x in outputs)
    assert not judge.judge(poisoned, gradients).correct
    assert not judge.judge((*outputs, outputs[0]), gradients).correct


def test_rows_carry_machine_times_and_shares(tmp_path):
    machine, rows = run(tmp_path, ["ffn"])
    assert machine["machine"]["processor"]
    assert machine["gpu"] is None
    assert machine["limits"] == LIMITS.as_json()
    measured = {(row["contender"], row["phase"]): row for row in rows if "cold" in row}
    for name in (OURS, EAGER, BOUND):
        for phase in ("forward", "backward", "full"):
            row = measured[name, phase]
            assert row["cold"]["q1_ms"] <= row["cold"]["median_ms"] <= row["cold"]["q3_ms"]
            assert row["warm"]["samples"] == 2
            assert row["share_of_limit"] == pytest.approx(
                1e3 * row["flops"] / 1e10 / row["cold"]["median_ms"]
            )
    assert measured[OURS, "full"]["correct"] is True
    assert measured[EAGER, "full"]["speedup"] == 1.0
    assert measured[BOUND, "full"]["correct"] is None
    assert "speedup" not in measured[BOUND, "full"]


def test_a_wrong_contender_gets_no_speedup(tmp_path, monkeypatch, caplog):
    real = module.contenders

    def bent(case, device, *, quick):
        def build(case, inputs):
            right = own_call(case, inputs, "reference")
            return lambda *leaves: tuple(1.01 * out for out in right(*leaves))

        every = [c for c in real(case, device, quick=quick) if c.name != OURS]
        return [Contender(OURS, build), *every]

    monkeypatch.setattr(module, "contenders", bent)
    with caplog.at_level("WARNING"):
        _, rows = run(tmp_path, ["layernorm"])
    ours = [row for row in rows if row["contender"] == OURS]
    assert len(ours) == 3
    assert all(row["correct"] is False and "speedup" not in row for row in ours)
    assert any("gptopt is wrong" in record.message for record in caplog.records)
    assert all("speedup" in row for row in rows if row["contender"] == EAGER)


def test_nobody_is_compared_with_a_wrong_baseline(tmp_path, monkeypatch):
    def bent(case, device, *, quick):
        def wrong(case, inputs):
            right = own_call(case, inputs, "reference")
            return lambda *leaves: tuple(1.01 * out for out in right(*leaves))

        own = Contender(OURS, lambda case, inputs: own_call(case, inputs, "reference"))
        return [own, Contender(EAGER, wrong)]

    monkeypatch.setattr(module, "contenders", bent)
    _, rows = run(tmp_path, ["rotary"])
    assert rows
    assert not any("speedup" in row for row in rows)


def test_a_contender_that_fails_is_a_row_with_its_error(tmp_path, monkeypatch):
    real = module.contenders

    def with_broken(case, device, *, quick):
        def build(case, inputs):
            raise RuntimeError("no kernel image")

        return [Contender("broken", build), *real(case, device, quick=quick)]

    monkeypatch.setattr(module, "contenders", with_broken)
    _, rows = run(tmp_path, ["attention"])
    errors = {row["contender"]: row["error"] for row in rows if row.get("error")}
    assert errors["broken"] == "RuntimeError: no kernel image"
    assert errors["SDPA cuDNN"] == "cuDNN needs a GPU"
    assert any(row["contender"] == OURS and row["correct"] for row in rows if "cold" in row)


def test_a_spent_budget_starts_nothing(tmp_path):
    _, rows = run(tmp_path, [], minutes=1e-9)
    assert rows == []


def test_only_names_operators_and_words_of_their_cases():
    names = {c.name for c in cases(GPU, quick=True, only=["attention:d64"])}
    assert names == {"d64 causal T 1024", "d64 causal T 4096"}
    assert {c.operator for c in cases(GPU, quick=False, only=[])} == set(OPERATORS)
    order = [c.operator for c in cases(GPU, quick=True, only=[])]
    assert order == sorted(order, key=OPERATORS.index)
    assert order[0] == "cross_entropy"


def test_every_contender_has_a_known_name():
    for device in (CPU, GPU):
        for case in cases(device, quick=False, only=[]):
            for contender in contenders(case, device, quick=False):
                assert contender.name in NAMES


def test_least_work_is_the_textbooks():
    sizes = {"B": 2, "H": 4, "K": 2, "T": 8, "D": 16}
    causal = Case("attention", "", sizes, {"causal": True})
    full = Case("attention", "", sizes, {"causal": False})
    assert least_work(full, "forward").flops == 4 * 2 * 4 * 8 * 8 * 16
    assert least_work(causal, "forward").flops == least_work(full, "forward").flops / 2
    assert least_work(causal, "full").flops == 3.5 * least_work(causal, "forward").flops
    norm = Case("layernorm", "", {"N": 10, "C": 6}, {"kind": "layer"})
    assert least_work(norm, "forward").bytes == 4 * 10 * 6 * 2
    head = Case("cross_entropy", "", {"N": 10, "C": 6, "V": 50})
    assert least_work(head, "full").flops == 3 * 2 * 10 * 6 * 50


def test_a_limit_is_the_longer_of_moving_and_computing():
    limits = Limits(100.0, {"float32": 10.0})
    assert limits.ms(Work(flops=10, bytes=50), "float32") == 1000.0
    assert limits.ms(Work(flops=1, bytes=50), "float32") == 500.0


def test_appending_keeps_the_newest_row(tmp_path):
    for value in (1, 2):
        with Recorder(tmp_path, "kernels", CPU, LIMITS, append=value > 1) as recorder:
            recorder.add({"contender": OURS, "case": "a", "value": value})
            recorder.add({"contender": OURS, "case": str(value), "value": value})
    _, rows = read_rows(tmp_path / "kernels.jsonl")
    assert {row["case"]: row["value"] for row in rows} == {"a": 2, "1": 1, "2": 2}
    lines = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert "machine" in json.loads(lines[0])
