"""Contenders as processes that stand still between their turns, and what else the machine did.

A stopped process cannot disturb the others, whatever its threads do while they wait for work.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from gptopt.errors import UserError

_TICKS = 100.0  # of a second, in /proc; os.sysconf says so too on every Linux there is


class Worker:
    """A process that answers a line with a line of JSON, stopped while nobody asks.

    Args:
        command: program and arguments.
        environment: variables set for it; None removes one.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str | None]) -> None:
        if not hasattr(signal, "SIGSTOP"):
            raise UserError("gptopt bench inference stops processes, which this system cannot")
        chosen = {**os.environ, **environment}
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={name: value for name, value in chosen.items() if value is not None},
        )
        began = time.perf_counter()
        self.hello = self._read()
        self.started_s = time.perf_counter() - began
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, **command: Any) -> dict[str, Any]:
        """One turn: the answer, with `other_cpu`, how many CPUs other processes took meanwhile."""
        if self._process.poll() is not None:
            return {"error": "the process is gone"}
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        before, began = _busy_s() - self._own_s(), time.perf_counter()
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            answer = self._read()
        except BrokenPipeError:  # it died between the question before and this one
            return {"error": "the process is gone"}
        taken = max(time.perf_counter() - began, 1e-3)
        answer["other_cpu"] = max(0.0, (_busy_s() - self._own_s() - before) / taken)
        self._stop()
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.send_signal(signal.SIGCONT)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a question it never read
                    stream.close()

    def _stop(self) -> None:
        """Stop it, and wait until all of its threads stand still: a signal takes its time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            began = time.perf_counter()
            while self._state() not in "TtZX" and time.perf_counter() - began < 1.0:
                time.sleep(1e-3)

    def _state(self) -> str:
        """The letter of /proc, "T" where it is stopped and also where nobody knows."""
        fields = self._fields()
        return fields[0] if fields else "T"

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": "the process ended without an answer"}
        found: dict[str, Any] = json.loads(line)
        return found

    def _own_s(self) -> float:
        fields = self._fields()
        return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0

    def _fields(self) -> list[str]:
        """What /proc says after the process's name; nothing where it says nothing."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return []
        return text.rpartition(")")[2].split()


def _busy_s() -> float:
    """CPU seconds that all processes took since the machine started; 0 where nobody knows."""
    try:
        with Path("/proc/stat").open(encoding="utf-8") as file:
            counts = [int(count) for count in file.readline().split()[1:]]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = counts
    return (user + nice + system + irq + softirq) / _TICKS


def wait_for_quiet(limit_cpus: float, longest_s: float) -> None:
    """Return when the machine takes less than so many CPUs, or when that took too long."""
    began = time.perf_counter()
    while time.perf_counter() - began < longest_s:
        busy, now = _busy_s(), time.perf_counter()
        time.sleep(0.2)
        if (_busy_s() - busy) / (time.perf_counter() - now) < limit_cpus:
            return


def run_once(command: Sequence[str]) -> str | None:
    """Run a preparation to its end; what it said where it failed."""
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    answer = done.stdout.strip()
    if done.returncode == 0 and not answer:
        return None
    try:
        return str(json.loads(answer.splitlines()[-1])["error"])
    except (ValueError, KeyError, IndexError):
        lines = done.stderr.strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {done.returncode}"


def worker_command(python: str, peer: str, model: Path, variant: str) -> list[str]:
    """How bench/peers/worker.py is started."""
    script = Path(__file__).parent / "peers" / "worker.py"
    command = [python or sys.executable, "-P", str(script), "--peer", peer]
    return [*command, "--model", str(model), "--variant", variant]
