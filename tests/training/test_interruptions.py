"""Signals, kills, full disks and second trainers, on the real command in a process of its own."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest

from gptopt.manifest import verify_manifest
from gptopt.training import train
from gptopt.training.checkpoints import Checkpoints
from gptopt.training.metrics import read_metrics

LONG = {"steps": 120, "checkpoint_every": 25, "log_every": 1, "schedule": "constant"}
MAIN = "import sys; from gptopt.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def start():
    """Start `gptopt train` with the arguments, after some Python of ours; killed at the end."""
    with contextlib.ExitStack() as stack:

        def run(arguments, before="") -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"{before}\n{MAIN}", "train", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def wait_for(condition, process, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


def last_step(run):
    path = run / "metrics.jsonl"
    return read_metrics(path)[-1]["step"] if path.exists() and path.stat().st_size else 0


def test_kill_9_and_resume_equals_a_run_never_killed(options, flags, tmp_path, start):
    changes = LONG | {"accumulate": 2, "model": {"dropout": 0.1}}
    train(options("straight", **changes))
    killed = tmp_path / "killed"
    process = start(flags("killed", **changes))
    # A checkpoint is complete some steps after it was due.
    wait_for(lambda: last_step(killed) > 40 and (killed / "latest").exists(), process)
    process.kill()
    process.wait()
    assert last_step(killed) < 120, "the kill came too late to test anything"

    # At once: the lock of a killed process holds nobody up.
    result = train(options("killed", resume=True, **changes))
    assert 25 <= result["resumed_from"] < 120
    straight = tmp_path / "straight"
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        files = [Checkpoints(run).of(120) / name for run in (straight, killed)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    states = [json.loads((Checkpoints(run).of(120) / "state.json").read_text())
              for run in (straight, killed)]  # fmt: skip
    assert states[0]["random"] == states[1]["random"]
    assert states[0]["train"]["sampler"] == states[1]["train"]["sampler"]
    losses = [[(line["step"], line["loss"], line.get("val_loss"))
               for line in read_metrics(run / "metrics.jsonl")]
              for run in (straight, killed)]  # fmt: skip
    assert losses[0] == losses[1]
    assert [step for step, *_ in losses[1]] == list(range(1, 121))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_a_resume_goes_on_from_there(
    options, flags, tmp_path, start, number, code
):
    run = tmp_path / "run"
    changes = LONG | {"checkpoint_every": 0, "steps": 100_000}
    process = start(flags(**changes))
    wait_for(lambda: last_step(run) > 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    (saved,) = (run / "checkpoints").iterdir()
    verify_manifest(saved, "checkpoint")
    step = last_step(run)
    message = f"{number.name}, saved at step {step}; continue with the same command and --resume"
    assert message in errors
    assert "Traceback" not in errors
    assert saved.name == f"step-{step:06d}"
    result = train(options(resume=True, **changes | {"steps": step + 2}))
    assert (result["resumed_from"], result["steps"]) == (step, step + 2)


SLOW_EVALUATION = """
import time, gptopt.training.loop as loop
loop.evaluate = lambda *arguments: time.sleep(60)
"""


def test_a_second_signal_exits_at_once_and_harms_nothing(flags, tmp_path, start):
    run = tmp_path / "run"
    process = start(flags(steps=50, eval_every=4, checkpoint_every=4), SLOW_EVALUATION)
    wait_for(lambda: (run / "latest").exists(), process)
    process.send_signal(signal.SIGINT)
    while "once more to stop at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    verify_manifest(run / "checkpoints/step-000004", "checkpoint")


def test_a_second_trainer_on_a_running_run_is_refused(options, flags, tmp_path, start):
    from gptopt.errors import UserError

    process = start(flags(steps=50, eval_every=4, checkpoint_every=4), SLOW_EVALUATION)
    wait_for((tmp_path / "run/latest").exists, process)
    with pytest.raises(UserError, match=rf"process {process.pid} on .* is training in this run"):
        train(options(resume=True))


def test_numbers_that_blow_up_exit_with_3_in_one_line(flags, start):
    process = start([*flags(), "--lr", "1e38", "--warmup-steps", "0", "--grad-clip", "0"])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    last = errors.splitlines()[-1]
    assert last.startswith("gptopt: error: ")
    assert "is not finite" in last


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_full_disk_leaves_the_older_checkpoint_whole(options, flags, tmp_path, start):
    run = tmp_path / "run"
    train(options(steps=4))
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*.safetensors")}
    process = start([*flags(steps=8), "--resume"], FULL_DISK)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    last = errors.splitlines()[-1]
    assert "step-000006: cannot be written" in last
    assert "free space" in last
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*.safetensors")} == before
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert (run / "latest").read_text() == "step-000004\n"
    assert train(options(steps=8, resume=True))["resumed_from"] == 4
