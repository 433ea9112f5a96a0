"""config.toml, metrics.jsonl and the lock of a run folder."""

import errno
import json
import os
import subprocess
import sys
import tomllib

import pytest

from gptopt.config import TrainOptions
from gptopt.errors import UserError
from gptopt.training.folder import refuse_foreign, to_toml, write_config
from gptopt.training.lock import LOCK, hold_lock
from gptopt.training.metrics import METRICS, Metrics, read_metrics


def test_config_toml_reads_back_as_the_same_options(options, tmp_path):
    chosen = options(lr=3e-4, inputs=['odd "name"\\ \t\x7f é.txt', "b"], max_seconds=1.5)
    write_config(tmp_path, chosen)
    read = tomllib.loads((tmp_path / "config.toml").read_text(encoding="utf-8"))
    again = TrainOptions.model_validate({**read, "json": True})
    assert again == chosen


def test_toml_writes_numbers_that_toml_knows():
    values = {"a": 1e-5, "b": 1e20, "c": -3, "d": True, "e": None, "f": [], "g": {"h": 0.1}}
    expected = {key: value for key, value in values.items() if value is not None}
    assert tomllib.loads(to_toml(values)) == expected


def test_a_cut_off_last_line_is_left_out(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / METRICS) == [{"step": 1, "loss": 2.0}]


def test_truncation_keeps_earlier_steps_only(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.append({"step": step})
    metrics.truncate(3)
    metrics.append({"step": 3})
    assert [line["step"] for line in read_metrics(metrics.path)] == [1, 2, 3]


def test_metrics_refuse_numbers_that_json_lacks(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Metrics(tmp_path).append({"step": 1, "loss": float("nan")})


HOLDER = """
import sys, time
from pathlib import Path
from gptopt.training.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_trainer_is_refused_and_told_who_holds_the_lock(holder, tmp_path):
    message = rf"process {holder.pid} on .* choose another --out"
    with pytest.raises(UserError, match=message), hold_lock(tmp_path):
        pass


def test_a_killed_holder_leaves_no_lock(holder, tmp_path):
    holder.kill()
    holder.wait()
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] != holder.pid


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(UserError, match="not a run folder"):
        refuse_foreign(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        refuse_foreign(tmp_path / "thesis.tex")
    refuse_foreign(tmp_path / "new")


def test_a_full_disk_does_not_keep_a_lock_from_holding(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gptopt.training.lock.os.write", full)
    refused = pytest.raises(UserError, match="is training in this run folder")
    with hold_lock(tmp_path), refused, hold_lock(tmp_path):
        pass
