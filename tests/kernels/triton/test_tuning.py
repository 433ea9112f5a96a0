"""Tuning: what is faster and right is kept for this machine, and a broken cache costs nothing."""

import json
import logging

import pytest
import torch

from gptopt.kernels import launch, layernorm, proof, tuning, tuning_cases
from gptopt.kernels.launch import Config
from gptopt.kernels.proof_cases import Case

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="its timer is made up")
KEY = ("layernorm.fwd", torch.float32, "32")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, and a process that has not looked at it."""
    monkeypatch.setenv("GPTOPT_CACHE_DIR", str(tmp_path))
    new_process()
    yield tmp_path
    monkeypatch.undo()
    new_process()


def new_process():
    launch.tuned.cache_clear()
    launch.choose.cache_clear()


@pytest.fixture
def case(device):
    x, weight = (
        torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((7, 24), (24,))
    )

    def function(impl):
        return lambda x, weight: layernorm(x, weight, None, x, impl=impl)

    return Case("small", [x, weight], function, torch.float32)


def timed(run):
    """A row block of 8 is fastest, and a forward kernel is all that counts."""
    run()
    return 1.0 + abs(launch.choose("layernorm.fwd", "interpreter", *KEY[1:]).sizes["ROWS"] - 8)


def tune(device, case, timer=timed, **more):
    return tuning.tune("layernorm", device, cases=[case], timer=timer, **more)


def test_the_faster_configuration_is_kept_and_used_by_the_next_process(device, cache, case):
    before = launch.shipped("layernorm.fwd", "interpreter", *KEY[1:])
    assert before.sizes["ROWS"] == 16
    found = {result.kernel: result for result in tune(device, case)}
    assert {"layernorm.fwd", "layernorm.bwd"} <= found.keys()
    best = found["layernorm.fwd"]
    assert best.better
    assert best.config.sizes["ROWS"] == 8
    assert (best.ms, best.before_ms) == (1.0, 9.0)
    assert not found["layernorm.bwd"].better
    new_process()
    assert launch.choose("layernorm.fwd", "interpreter", *KEY[1:]).sizes["ROWS"] == 8
    assert launch.choose("layernorm.fwd", "interpreter", torch.float16, "32") == before
    (file,) = (cache / "tuned").iterdir()
    content = json.loads(file.read_text())
    assert content["machine"] == proof.machine(device)
    assert [entry["kernel"] for entry in content["entries"]] == ["layernorm.fwd"]


def test_a_faster_configuration_with_wrong_results_is_refused(device, cache, case, monkeypatch):
    real = proof._share_of_budget

    def share(case):
        rows = launch.choose("layernorm.fwd", "interpreter", *KEY[1:]).sizes["ROWS"]
        return (7.0, "result 0 has error 3") if rows == 8 else real(case)

    monkeypatch.setattr(proof, "_share_of_budget", share)
    found = {result.kernel: result for result in tune(device, case)}["layernorm.fwd"]
    assert not found.better
    assert any("result 0 has error 3" in reason for reason in found.refused)
    assert not (cache / "tuned").exists()
    assert launch.choose("layernorm.fwd", "interpreter", *KEY[1:]).sizes["ROWS"] == 16


def test_what_cannot_run_is_passed_over_and_the_time_is_bounded(device, cache, case):
    def fails_at_32(run):
        rows = launch.choose("layernorm.fwd", "interpreter", *KEY[1:]).sizes["ROWS"]
        if rows == 32:
            raise RuntimeError("out of resource: shared memory")
        return timed(run)

    found = {result.kernel: result for result in tune(device, case, fails_at_32)}
    assert any("RuntimeError" in reason for reason in found["layernorm.fwd"].refused)
    assert found["layernorm.fwd"].better
    new_process()
    late = tune(device, case, seconds=0.0)
    assert all(result.tried == 0 and not result.better for result in late)
    assert all(result.refused == ("the time was over",) for result in late)


def test_what_is_hardly_faster_is_noise(device, cache, case):
    def hardly(run):
        return timed(run) / 1000 + 1.0

    assert not any(result.better for result in tune(device, case, hardly))


def test_a_wrong_configuration_never_outlives_its_trial(device, cache, case):
    def broken(run):
        if launch.tuned("interpreter"):
            raise KeyboardInterrupt
        return timed(run)

    with pytest.raises(KeyboardInterrupt):
        tune(device, case, broken)
    assert not launch.tuned("interpreter")
    assert not (cache / "tuned").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: text.replace('"num_warps"', '"warps"'),
        lambda text: text.replace('"ROWS": 8', '"ROWS": "8"'),
        lambda text: text.replace('"float32"', '"floaty"'),
        lambda text: text.replace('"sources"', '"other"'),
    ],
)
def test_a_broken_cache_costs_a_line(device, cache, case, caplog, spoil):
    tune(device, case)
    (file,) = (cache / "tuned").iterdir()
    file.write_text(spoil(file.read_text()))
    new_process()
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        config = launch.choose("layernorm.fwd", "interpreter", *KEY[1:])
        launch.choose("layernorm.fwd", "interpreter", torch.float16, "32")
    assert config == launch.shipped("layernorm.fwd", "interpreter", *KEY[1:])
    assert caplog.text.count("is no cache of configurations") == 1


def test_a_cache_that_cannot_be_written_costs_a_line(device, cache, case, caplog):
    (cache / "tuned").write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, logger="gptopt.kernels"):
        assert any(result.better for result in tune(device, case))
    assert "is not kept" in caplog.text
    assert launch.choose("layernorm.fwd", "interpreter", *KEY[1:]).sizes["ROWS"] == 8  # here it is


def test_other_sources_are_another_machine(device, cache, case, monkeypatch):
    tune(device, case)
    monkeypatch.setattr(proof, "_sources", lambda: "changed")
    new_process()
    assert launch.choose("layernorm.fwd", "interpreter", *KEY[1:]).sizes["ROWS"] == 16


def test_the_cache_becomes_a_part_of_the_shipped_table(device, cache, case, tmp_path, monkeypatch):
    tune(device, case)
    table = launch._table("layernorm")
    new = tuning.merged(table, "layernorm", device)
    assert new["kernels"]["fwd"][0] == {
        "arch": "interpreter",
        "dtype": "float32",
        "shape": "32",
        "sizes": {"ROWS": 8},
        "num_warps": 1,
        "num_stages": 1,
    }
    assert new["kernels"]["fwd"][1:] == table["kernels"]["fwd"]
    assert "the interpreter" in new["source"]
    assert tuning.merged(table, "rotary", device) is table
    assert tuning.merged(new, "layernorm", device)["kernels"] == new["kernels"]  # once
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "layernorm.json").write_text(json.dumps(new))
    monkeypatch.setattr(launch, "_CONFIGS", folder)
    launch._table.cache_clear()
    try:
        found = launch.shipped("layernorm.fwd", "interpreter", *KEY[1:])
        assert found == Config({"ROWS": 8}, 1, 1)
        assert launch.shipped("layernorm.fwd", "sm_90", *KEY[1:]).sizes["ROWS"] == 64
    finally:
        launch._table.cache_clear()


def test_a_specific_entry_stays_before_a_tuned_one(device, cache, monkeypatch):
    entries = [{"shape": "d64 rich", "num_warps": 1, "num_stages": 1},
               {"shape": "d64", "num_warps": 2, "num_stages": 1},
               {"num_warps": 4, "num_stages": 1}]  # fmt: skip
    tuned = {"kernel": "thing.fwd", "dtype": "float32", "shape": "d64", "sizes": {"M": 4},
             "num_warps": 8, "num_stages": 2}  # fmt: skip
    monkeypatch.setattr(tuning, "_read", lambda device: [tuned])
    new = tuning.merged({"source": "s", "kernels": {"fwd": entries}}, "thing", device)
    assert [entry["num_warps"] for entry in new["kernels"]["fwd"]] == [1, 8, 2, 4]


def test_without_a_gpu_nothing_is_tuned(device):
    with pytest.raises(ValueError, match="expected a GPU"):
        tuning.tune("layernorm", "cpu")


def test_the_shipped_table_alone_counts_where_no_gpu_is_in_use(cache):
    assert tuning.recall("sm_90") == {}


def test_candidates_are_few_and_all_different():
    config = Config({"BLOCK_M": 16, "BLOCK_N": 64, "FORM": 3, "ROWS": 1}, 8, 1)
    found = list(tuning.candidates(config))
    assert len(found) == len({str(c) for c in found}) == 7
    assert all(c.sizes["FORM"] == 3 and c.sizes["BLOCK_M"] >= 16 for c in found)
    assert {c.num_warps for c in found} == {4, 8, 16}


@pytest.mark.parametrize("operator", tuning.OPERATORS)
def test_the_calls_that_are_tuned_are_calls(operator):
    """Their shapes and arguments fit, seen on a device that holds no data."""
    device = torch.device("meta")

    def random(*shape):
        return torch.zeros(shape, dtype=torch.float64, device=device)

    made = list(tuning_cases._CASES[operator](random, device))
    assert len({name for name, _, _ in made}) == len(made)
    for _, inputs, function in made:
        results = function("reference")(*(x.to(torch.bfloat16) for x in inputs))
        assert all(result.device == device for result in results)
