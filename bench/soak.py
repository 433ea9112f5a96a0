"""Storms over a run folder: killed at random moments, and on disks that fill up, hundreds of times.

python -P -m gptopt.bench.soak [--minutes 20] [--out bench/results/soak.json]

A try starts or resumes a run, ends it in some bad way, and looks at what is left: it survived if
the newest checkpoint that was ever complete still loads. At the end of a storm the run is let go
on to its last step, and must be bit for bit the run that nobody disturbed.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptopt import cli
from gptopt.bench.machine import stamp
from gptopt.bench.resume import SENTENCES, differences
from gptopt.checkpoint import load_model
from gptopt.errors import UserError
from gptopt.log import say
from gptopt.manifest import write_json, write_text
from gptopt.training import run as training_run
from gptopt.training.checkpoints import Checkpoints, step_of

_STEPS = 4000
_FLAGS = {
    "device": "cpu", "steps": _STEPS, "batch-size": 4, "warmup-steps": 10, "schedule": "constant",
    "eval-every": 40, "eval-batches": 1, "checkpoint-every": 10, "log-every": 5, "seed": 5,
    "data.kind": "char", "model.n-layer": 1, "model.n-head": 2, "model.n-embd": 32,
    "model.block-size": 16, "model.dropout": 0.1,
}  # fmt: skip
_PATIENCE_S = 120
_CRASHED = 99  # of a child, by an exception that the command line does not know
Try = Callable[[list[str], random.Random], None]


class Storm:
    """One run folder in one kind of weather."""

    def __init__(self, name: str, folder: Path, disturb: Try, seed: int) -> None:
        self.name, self.run = name, folder / name.replace(" ", "-")
        self.disturb = disturb
        self.chance = random.Random(seed)  # noqa: S311 - no secret
        self.tries = self.survived = 0
        self.complete = 0  # the last step that was ever saved
        self.lost: list[str] = []

    def once(self, arguments: list[str]) -> None:
        """One bad end, and a look at what it left."""
        self.tries += 1
        self.disturb(arguments, self.chance)
        try:
            step = self.newest_step()
        except (UserError, AssertionError) as error:
            self.lost.append(f"try {self.tries}: {error}")
            return
        self.survived += 1
        self.complete = step

    def newest_step(self) -> int:
        """The step of the newest complete checkpoint, which loads; 0 before the first."""
        checkpoints = Checkpoints(self.run)
        newest = checkpoints.newest()
        if newest is None:
            assert self.complete == 0, f"no checkpoint, where step {self.complete} was saved"
            return 0
        step = step_of(newest)
        assert step >= self.complete, f"back at step {step}, where {self.complete} was saved"
        pointed = checkpoints.pointed("latest")
        assert pointed is None or pointed.is_dir(), f"latest names {pointed}, which is not there"
        load_model(newest)
        return step


def kill(arguments: list[str], chance: random.Random) -> None:
    """kill -9 at a random moment, from the first import on to many checkpoints later."""
    child = _fork(arguments)
    time.sleep(chance.uniform(0.02, 3.0))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def fill_disk(arguments: list[str], chance: random.Random) -> None:
    """No file may grow beyond some size: writes fail in the middle, at each place in turn."""
    limit = int(10 ** chance.uniform(1, 5.3))
    child = _fork(arguments, limit)
    deadline = time.monotonic() + chance.uniform(1.0, 3.0)
    while time.monotonic() < deadline:  # a limit above every file lets the run go on
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, 2), f"ended with {code} under a limit of {limit} bytes"
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill_rank(arguments: list[str], chance: random.Random) -> None:
    """kill -9 on one of two ranks, or on both of them and their launcher."""
    process = _launch(arguments)
    try:
        if chance.random() < 0.8:  # else anywhere on its way there
            _wait_for_steps(Path(arguments[arguments.index("--out") + 1]))
        time.sleep(chance.uniform(0, 6))
        victims = _children(process.pid)
        if victims and chance.random() < 0.7:
            os.kill(chance.choice(victims), signal.SIGKILL)
            process.wait(timeout=_PATIENCE_S)
    finally:
        _kill_all(process)


def _wait_for_steps(run: Path) -> None:
    """Until a run that was started goes on from where it was."""
    path = run / "metrics.jsonl"
    before, deadline = path.stat().st_mtime_ns, time.monotonic() + _PATIENCE_S
    while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.02)


def _kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """End a launcher and its ranks, which are no process group, and wait until they are gone."""
    if launcher.poll() is not None:
        return
    os.kill(launcher.pid, signal.SIGSTOP)  # it starts no other rank meanwhile
    ranks = _children(launcher.pid)
    for pid in (launcher.pid, *ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()
    while any(map(_runs, ranks)):
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    return [int(child) for child in listed.split()]


def _runs(pid: int) -> bool:
    """Whether a process is there, and not only its entry in the table."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _launch(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Two ranks under torchrun that hold a part of the model each."""
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--no-python", "--standalone",
                "--nproc-per-node", "2"]  # fmt: skip
    return subprocess.Popen(
        [*launcher, sys.executable, "-P", "-m", "gptopt", *arguments, "--parallel", "fsdp"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _fork(arguments: list[str], limit_bytes: int | None = None) -> int:
    """A child that runs the command, with no import to wait for."""
    child = os.fork()
    if child:
        return child
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(sink, stream)
        if limit_bytes is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        os._exit(cli.main(arguments))
    finally:
        os._exit(_CRASHED)


def _finish(arguments: list[str], storm: Storm) -> int:
    """The exit code of a run that nobody disturbs."""
    if storm.disturb is kill_rank:
        return _launch(arguments).wait()
    return os.waitstatus_to_exitcode(os.waitpid(_fork(arguments), 0)[1])


def main() -> int:
    """Run the storms and write their table; 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=18.0, help="for all storms together")
    parser.add_argument("--out", type=Path, default=Path("bench/results/soak.json"))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    # Imported here, for children of a fork import nothing; and most of a try would be this probe.
    setattr(training_run, "matmul_peak", lambda device, dtype: None)  # noqa: B010 - mypy takes no other
    kinds: dict[str, tuple[Try, float]] = {
        "kill -9": (kill, 0.5),
        "full disk": (fill_disk, 0.3),
        "kill -9 of a rank": (kill_rank, 0.2),
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, "".join(SENTENCES[i * i % 3] for i in range(600)))
        for name, (disturb, share) in kinds.items():
            storm = Storm(name, Path(folder), disturb, chosen.seed)
            rows.append(_blow(storm, text, 60 * chosen.minutes * share))
            say(_shown(rows[-1]))
    write_json(chosen.out, {"storms": rows, "machine": stamp()})
    return int(any(row["lost"] or row["differs"] for row in rows))


def _blow(storm: Storm, text: Path, seconds: float) -> dict[str, Any]:
    arguments = ["train", str(text), "--out", str(storm.run), "--resume", "--quiet"]
    arguments += [part for key, value in _FLAGS.items() for part in (f"--{key}", str(value))]
    began = time.monotonic()
    if _finish([*arguments, "--steps", str(_FLAGS["eval-every"])], storm) != 0:
        raise RuntimeError(f"{storm.name}: the run fails in good weather")
    storm.complete = storm.newest_step()
    while not storm.tries or time.monotonic() - began < seconds * 0.8:
        storm.once(arguments)
    # What was disturbed so often, let alone, ends as if it never had been.
    last = storm.complete + 20
    straight = storm.run.with_name(storm.run.name + "-straight")
    arguments += ["--steps", str(last)]
    alone = [str(straight) if part == str(storm.run) else part for part in arguments]
    ends = [_finish(arguments, storm), _finish(alone, storm)]
    differs = list(differences(storm.run, straight)) if ends == [0, 0] else [f"exit {ends}"]
    return {
        "storm": storm.name, "tries": storm.tries, "survived": storm.survived,
        "lost": storm.lost, "steps": storm.complete, "differs": differs,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _shown(row: dict[str, Any]) -> str:
    return (
        f"{row['storm']:<20}tries {row['tries']:<6}survived {row['survived']:<6}"
        f"lost {len(row['lost']):<4}steps {row['steps']:<7}"
        f"{'then as if undisturbed' if not row['differs'] else 'DIFFERS: ' + str(row['differs'])}"
    )


if __name__ == "__main__":
    sys.exit(cli.in_one_line(main))
