"""`--track`: what trackers are told, under which name, and what their failures cost: nothing."""

import importlib
import json
import logging
import sys
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from gptopt import cli
from gptopt.errors import UserError
from gptopt.training import trackers, train
from gptopt.training.metrics import read_metrics

# The packages' own signatures, of what is called here: they note what they are told.
WANDB = """
calls, fail_at, refuse = [], None, False
class Run:
    url = None
    def log(self, data, step=None, commit=None):
        if step == fail_at:
            raise OSError("the server is gone\\nand so on")
        calls.append(("log", step, data))
    def finish(self, exit_code=None):
        calls.append(("finish", exit_code))
def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
         config=None, mode=None, resume=None, settings=None):
    if refuse:
        raise RuntimeError("api_key not configured")
    calls.append(("init", id, resume, config["lr"], dir))
    return Run()
"""
TRACKIO = """
calls = []
def init(project, name=None, group=None, config=None, resume="never", settings=None, embed=True):
    print("* Trackio project initialized")
    calls.append(("init", name, resume, config["lr"]))
def log(metrics, step=None):
    calls.append(("log", step, metrics))
def finish():
    calls.append(("finish",))
"""
TENSORBOARDX = """
calls = []
class SummaryWriter:
    def __init__(self, logdir=None, comment="", purge_step=None):
        calls.append(("init", logdir, purge_step))
    def add_text(self, tag, text_string, global_step=None):
        pass
    def add_scalar(self, tag, scalar_value, global_step=None):
        if calls[-1][:2] != ("log", global_step):
            calls.append(("log", global_step, {}))
        calls[-1][2][tag] = scalar_value
    def flush(self):
        pass
    def close(self):
        calls.append(("finish",))
"""
ALL = ("tensorboard", "wandb", "trackio")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Modules that stand for the packages, by the names of the trackers."""
    folder, names = tmp_path / "packages", dict(zip(ALL, ("tensorboardX", *ALL[1:]), strict=True))
    folder.mkdir()
    for name, code in zip(names.values(), (TENSORBOARDX, WANDB, TRACKIO), strict=True):
        (folder / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(
        trackers, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    yield {tracker: importlib.import_module(name) for tracker, name in names.items()}
    for name in names.values():
        del sys.modules[name]


def told(module):
    return {step: figures for what, step, figures in module.calls[1:-1] if what == "log"}


def figures_of(run):
    lines = read_metrics(run / "metrics.jsonl")
    return {
        line.pop("step"): {name: value for name, value in line.items() if value is not None}
        for line in lines
    }


def test_every_tracker_hears_what_metrics_jsonl_says(options, tmp_path, packages, capsys):
    train(options(track=ALL, eval_every=3))
    figures = figures_of(tmp_path / "run")
    assert sorted(figures) == [1, 2, 3, 4, 5, 6]
    assert "val_loss" in figures[3]
    for module in packages.values():
        assert told(module) == figures
        assert module.calls[0][0] == "init"
        assert module.calls[-1][0] == "finish"
    assert packages["wandb"].calls[-1] == ("finish", 0)
    assert packages["wandb"].calls[0][3] == options().lr
    assert capsys.readouterr().out == ""  # results alone stand there, whatever trackers print


def test_a_resumed_run_goes_on_under_its_name(options, tmp_path, packages):
    train(options(track=ALL, steps=2))
    first = {name: list(module.calls) for name, module in packages.items()}
    for module in packages.values():
        module.calls.clear()
    train(options(track=ALL, steps=4, resume=True))
    name = json.loads((tmp_path / "run" / "tracking.json").read_text())["id"]
    assert name.startswith("run-")
    for tracker, module in packages.items():
        # The last step's line is what a checkpoint of it still has to write.
        assert sorted(told(module)) == [2, 3, 4]
        if tracker == "tensorboard":
            assert module.calls[0] == ("init", str(tmp_path / "run" / "tensorboard"), 2)
        else:
            assert module.calls[0][:3] == first[tracker][0][:3] == ("init", name, "allow")


def test_two_runs_of_one_name_are_told_apart(options, tmp_path, packages):
    for folder in ("a", "b"):
        train(options(f"{folder}/run", track=["wandb"], steps=1))
    one, two = (call[1] for call in packages["wandb"].calls if call[0] == "init")
    assert one != two


def test_tracking_changes_no_number(options, tmp_path, packages):
    train(options("plain"))
    train(options("tracked", track=ALL))
    plain, tracked = (
        load_file(tmp_path / name / "checkpoints" / "step-000006" / "model.safetensors")
        for name in ("plain", "tracked")
    )
    assert all(plain[name].equal(tracked[name]) for name in plain)
    states = [
        json.loads((tmp_path / name / "checkpoints" / "step-000006" / "state.json").read_text())
        for name in ("plain", "tracked")
    ]
    assert states[0]["random"] == states[1]["random"]


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(options, tmp_path, packages, caplog):
    packages["wandb"].fail_at = 3
    with caplog.at_level(logging.WARNING, "gptopt"):
        result = train(options(track=["wandb", "trackio"]))
    warned = [text for text in caplog.messages if "--track wandb" in text]
    assert len(warned) == 1
    assert "failed (the server is gone) and is told nothing more" in warned[0]
    assert result["steps"] == 6
    assert [call[1] for call in packages["wandb"].calls[1:]] == [1, 2]
    assert told(packages["trackio"]) == figures_of(tmp_path / "run")


def test_a_tracker_learns_that_the_run_did_not_end_well(options, packages, monkeypatch):
    def broken(self):
        raise UserError("the disk is full")

    monkeypatch.setattr("gptopt.training.saving.Saver.save", broken)
    with pytest.raises(UserError, match="the disk is full"):
        train(options(track=["wandb"]))
    assert packages["wandb"].calls[-1] == ("finish", 1)


def test_a_tracker_that_does_not_start_is_one_line_before_the_first_step(
    options, tmp_path, packages
):
    packages["wandb"].refuse = True
    with pytest.raises(UserError, match=r"--track wandb: does not start \(api_key") as error:
        train(options(track=["trackio", "wandb"]))
    assert "\n" not in str(error.value)
    assert packages["trackio"].calls[-1] == ("finish",)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    packages["wandb"].refuse = False
    assert train(options(track=["trackio", "wandb"]))["steps"] == 6  # and nothing is in the way


@pytest.mark.parametrize("name", ALL)
def test_a_package_that_is_missing_is_named_before_anything_is_made(
    flags, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    assert cli.main(["train", *flags(), "--track", name]) == 2
    (line,) = (
        text for text in capsys.readouterr().err.splitlines() if text.startswith("gptopt: error")
    )
    assert f"--track {name}: needs the package {name}" in line
    assert f"pip install 'gptopt[{name}]'" in line
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_nobody_knows_is_refused_by_its_flag(flags, capsys):
    assert cli.main(["train", *flags(), "--track", "wandb", "--track", "mlflow"]) == 2
    assert "gptopt train: --track: found 'mlflow'" in capsys.readouterr().err


def test_tensorboard_reads_the_run_back_and_forgets_steps_taken_again(options, tmp_path):
    pytest.importorskip("tensorboard", reason="the real tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(options(track=["tensorboard"], checkpoint_every=2, steps=3))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # a kill behind the last save
        file.write(json.dumps({"step": 4, "loss": 99.0}) + "\n")
    stale = trackers._TensorBoard(trackers.Start(tmp_path / "run", "run", {}, 4))
    stale.log(4, {"loss": 99.0})
    stale.finish(failed=True)
    train(options(track=["tensorboard"], checkpoint_every=2, steps=6, resume=True))
    figures = figures_of(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "val_loss", "tokens"):
        found = {event.step: event.value for event in events.Scalars(name)}
        wanted = {step: line[name] for step, line in figures.items() if name in line}
        assert found == pytest.approx(wanted, rel=1e-6)  # kept in float32
