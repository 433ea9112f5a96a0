"""Threads measured once per machine: the search, what is kept, and a file that is broken."""

import json
import logging
import os
import sys

import numpy as np
import pytest

from gptopt import usercache
from gptopt.config import RunOptions
from gptopt.errors import UserError
from gptopt.runtime import EdgeModel, settings
from gptopt.runtime.settings import Settings
from gptopt.runtime.tune import search, thread_counts
from gptopt.runtime.verbs import run


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Machine:
    """A clock that moves on by what a step costs under some settings."""

    def __init__(self, cost):
        self.now, self.cost, self.opened = 0.0, cost, []

    def open(self, candidate):
        self.opened.append(candidate)
        return Steps(self, candidate)


class Steps:
    capacity, columns = 1024, 16

    def __init__(self, machine, candidate):
        self.machine, self.candidate = machine, candidate

    def read(self, texts):
        self.machine.now += 5.0  # a prompt's time does not count

    def step(self, ids, live):
        self.machine.now += self.machine.cost(self.candidate)


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        (lambda s: 0.01 / s.threads * (1.2 if s.spinning == "off" else 1.0), Settings(4, "run")),
        (lambda s: 0.01 * s.threads, Settings(1, "off")),
        (lambda s: 0.01 / min(s.threads, 2) * {"off": 3, "run": 2, "on": 1}[s.spinning],
         Settings(2, "on")),
        (lambda s: 0.01 / s.threads, Settings(4, "off")),  # equal: the one that spins least
        (lambda s: 0.01 - 0.00001 * s.threads, Settings(1, "off")),  # hardly faster
    ],
)  # fmt: skip
def test_the_fastest_threads_are_found(cost, best):
    machine = Machine(cost)
    found, rates = search(machine.open, 4, clock=lambda: machine.now)
    assert found == best
    assert [Settings(r["threads"], r["spinning"]) for r in rates] == machine.opened
    fastest = max(rates, key=lambda rate: rate["tokens_per_second"])
    assert fastest["tokens_per_second"] == pytest.approx(1 / cost(best), rel=0.04)


def test_a_slow_machine_is_not_measured_for_ever():
    machine = Machine(lambda s: 1.0)
    search(machine.open, 2, clock=lambda: machine.now)
    assert machine.now < len(machine.opened) * (5 + 8)


@pytest.mark.parametrize(("cpus", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 3, 4, 6])])
def test_thread_counts(cpus, counts):
    assert thread_counts(cpus) == counts


def test_a_choice_is_kept_and_used(pristine, monkeypatch, own_cache):
    monkeypatch.setattr(settings, "cpus", lambda: 2)
    assert settings.chosen("cpu") == Settings(0, "off")
    assert settings.keep("cpu", Settings(2, "run"), [])
    assert settings.chosen("cpu") == Settings(2, "run")
    assert settings.chosen("cuda") == Settings(0, "off")
    assert settings.chosen("cpu", threads=1) == Settings(1, "off")
    assert settings.chosen("cpu", spinning="on") == Settings(2, "on")
    assert EdgeModel(pristine).settings == Settings(2, "run")
    monkeypatch.setattr(settings, "cpus", lambda: 8)  # another machine
    assert settings.chosen("cpu") == Settings(0, "off")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"threads": "2"}', '{"threads": 2}', '{"threads": 0, "spinning": 1}',
             '{"threads": 99999, "spinning": "on"}', '{"threads": true, "spinning": "on"}', "\x00"]
)  # fmt: skip
def test_a_broken_file_is_no_choice(pristine, own_cache, text):
    settings.keep("cpu", Settings(1), [])
    (path,) = (own_cache / "edge").iterdir()
    path.write_text(text)
    assert settings.chosen("cpu") == Settings(0, "off")
    assert EdgeModel(pristine).settings == Settings(0, "off")
    assert settings.keep("cpu", Settings(1), [])
    assert settings.chosen("cpu") == Settings(1, "off")


def test_a_file_that_is_not_json_is_told_in_a_log_line(own_cache, caplog):
    caplog.set_level(logging.INFO, "gptopt")
    (own_cache / "edge").mkdir(parents=True)
    (own_cache / "edge" / "x.json").write_bytes(b"\xff\xfe")
    assert usercache.recall("edge/x.json") is None
    assert "x.json is not used" in caplog.text


def test_a_directory_that_cannot_be_written_costs_a_log_line(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "gptopt")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTOPT_CACHE_DIR", str(tmp_path / "file"))
    assert not settings.keep("cpu", Settings(1), [])
    assert settings.chosen("cpu") == Settings()
    assert "is not kept" in caplog.text


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs file permissions")
def test_a_read_only_directory_costs_a_log_line(own_cache, caplog):
    caplog.set_level(logging.INFO, "gptopt")
    own_cache.mkdir()
    own_cache.chmod(0o500)
    assert not settings.keep("cpu", Settings(1), [])
    assert "is not kept" in caplog.text


def test_where_the_facts_lie(monkeypatch, tmp_path):
    monkeypatch.delenv("GPTOPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert usercache.folder() == tmp_path / "gptopt"


def options(folder, **more):
    values = {"temperature": 0, "max_new_tokens": 4, "prompt": [], **more}
    return RunOptions(folder=str(folder), **values)


def test_the_command_measures_and_keeps(pristine, capsys, own_cache):
    found = run(options(pristine, tune=True))["tuning"]
    chosen = Settings(found["threads"], found["spinning"])
    assert settings.chosen("cpu") == chosen
    assert capsys.readouterr().out == f"{chosen.threads} threads, spinning {chosen.spinning}\n"
    (path,) = (own_cache / "edge").iterdir()
    kept = json.loads(path.read_text())
    assert kept["machine"] == settings.machine()
    assert kept["rates"] == found["rates"]
    both = run(options(pristine, tune=True, prompt=["fox"], json=True))
    assert both["new_tokens"] == 4
    assert both["tuning"]["kept"] is True
    with pytest.raises(UserError, match="--threads: --tune finds the number"):
        run(options(pristine, tune=True, threads=1))


def test_settings_reach_onnxruntime(pristine, monkeypatch):
    import onnxruntime

    seen = []
    real = onnxruntime.InferenceSession

    def watch(path, given, **kwargs):
        seen.append(
            (given.intra_op_num_threads,
             given.get_session_config_entry("session.intra_op.allow_spinning"),
             given.get_session_config_entry("session.force_spinning_stop"))
        )  # fmt: skip
        return real(path, given, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watch)
    said = {
        tuple(
            EdgeModel(pristine, threads=2, spinning=spinning).generate(
                [[1, 2, 3]], options(pristine), end_ids=()
            )[0]
        )
        for spinning in settings.SPINNING
    }
    assert seen == [(2, "0", "0"), (2, "1", "1"), (2, "1", "0")]
    assert len(said) == 1


def test_a_wrong_precision_is_one_line(pristine, gptopt):
    done = gptopt("run", pristine, "--prompt", "x", "--precision", "q3", check=False)
    assert done.returncode == 2
    assert "has no file of precision 'q3', it has fp32" in done.stderr
    assert done.stderr.count("\n") <= 2
    assert EdgeModel(pristine, precision="fp32", threads=1).precision == "fp32"
    np.testing.assert_equal(EdgeModel(pristine, threads=1).file.cache, "growing")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "names no file"),
        ([], "names no file"),
        ({"q4": {"file": "../model.onnx"}}, "q4|file"),
        ({"q4": {"file": "onnx/model_q4.onnx", "cache": "magic"}}, "cache"),
        ({"q4": {"file": "onnx/model.onnx", "padding": "right"}}, "need a shared cache"),
        ({"q4": {"file": "onnx/model_q4.onnx"}}, "model_q4.onnx: missing"),
        ({"q4": {"file": "onnx/model.onnx", "cache_dtype": "int8"}}, "is tensor\\(float\\)"),
    ],
)
def test_impossible_facts_are_refused(folder, files, message):
    from gptopt.errors import CheckFailed
    from gptopt.manifest import write_manifest

    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"gptopt_edge": {"files": files}}
    path.write_text(json.dumps(config))
    write_manifest(folder, "edge")
    with pytest.raises(CheckFailed, match=message) as caught:
        EdgeModel(folder, threads=1)
    assert "\n" not in str(caught.value)


def test_only_the_file_that_runs_is_read(build_folder, monkeypatch):
    """Of the other precisions names and sizes are checked; a changed byte there harms nobody."""
    from gptopt.errors import CheckFailed
    from gptopt.runtime.folder import verify_folder

    built = build_folder(files={"fp32": {"form": "growing"}, "q4": {"form": "any"}}, external=True)
    data = built / "onnx" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[7] ^= 1
    data.write_bytes(content)
    assert EdgeModel(built, precision="q4", threads=1).precision == "q4"
    for precision in ("auto", "fp32"):
        with pytest.raises(CheckFailed, match=r"model\.onnx_data: its sha256 differs"):
            EdgeModel(built, precision=precision)
    with pytest.raises(CheckFailed, match=r"model\.onnx_data: its sha256 differs"):
        verify_folder(built)
    data.write_bytes(content[:-1])
    with pytest.raises(CheckFailed, match=r"model\.onnx_data: has"):
        EdgeModel(built, precision="q4", threads=1)
