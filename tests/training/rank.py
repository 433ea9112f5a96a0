"""Ranks that tests start: each does what a line of its stdin says, in JSON.

Starting processes takes longer than training tiny models, so the cases share them.
"""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

from gptopt.config import TrainOptions
from gptopt.config_finetune import ClassifyOptions, SftOptions
from gptopt.finetune import classify, sft
from gptopt.finetune.labelling import Labels
from gptopt.training import train
from gptopt.training.objective import Objective
from gptopt.training.session import Session
from gptopt.training.step import Stepper


class Ranks:
    """Processes that take part in runs, one after another."""

    def __init__(self, size):
        self.size = size
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(size)
        ]  # fmt: skip

    def train(self, options, **changes):
        """Each rank's answer."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank, process in enumerate(self.processes):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size,
                "LOCAL_WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            case = {
                "environment": {key: str(value) for key, value in environment.items()},
                "kind": type(options).__name__,
                "options": options.model_dump(mode="json", by_alias=True, exclude_unset=True),
                "changes": changes,
            }
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self.processes]

    def close(self):
        for process in self.processes:
            process.kill()
            process.communicate()


def results(answers):
    """What every rank's run returned."""
    assert all("result" in answer for answer in answers), answers
    return [answer["result"] for answer in answers]


@contextlib.contextmanager
def in_float64():
    """Weights, gradients and losses in float64, so that only the order of sums differs."""
    with contextlib.ExitStack() as held:
        for owner in (Objective, Labels):
            held.enter_context(mock.patch.object(owner, "build", _doubled(owner.build)))
        yield


def _doubled(build):
    return lambda *given: build(*given).double()


@contextlib.contextmanager
def poisoned(step, rank):
    """One rank's loss is NaN at one step."""
    forward = Stepper._forward_backward

    def bad(self, *given):
        loss = forward(self, *given)
        hit = self.state.step + 1 == step and self.session.world.rank == rank
        return loss * float("nan") if hit else loss

    with mock.patch.object(Stepper, "_forward_backward", bad):
        yield


@contextlib.contextmanager
def full_disk(step, rank):
    """One rank cannot write its part of one checkpoint."""
    write = Session.write

    def refuse(self, folder, snapshot):
        if snapshot.step == step and self.world.rank == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, folder, snapshot)

    with mock.patch.object(Session, "write", refuse):
        yield


VERBS = {kind.__name__: (kind, verb) for kind, verb in (
    (TrainOptions, train), (SftOptions, sft), (ClassifyOptions, classify))}  # fmt: skip
CHANGES = {"float64": in_float64, "poisoned": poisoned, "full_disk": full_disk}


def do(kind, options, changes):
    options_class, verb = VERBS[kind]
    quick = [
        mock.patch("gptopt.training.run.matmul_peak", return_value=None),
        mock.patch("gptopt.training.run.draw_loss", return_value=False),
        *(CHANGES[name](**given) for name, given in changes.items()),
    ]
    with contextlib.ExitStack() as held:
        for patch in quick:
            held.enter_context(patch)
        return verb(options_class.model_validate(options))


def main():
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not disturb the answers
    for line in sys.stdin:
        case = json.loads(line)
        os.environ.update(case["environment"])
        answer = {}
        try:
            answer["result"] = do(case["kind"], case["options"], case["changes"])
        except SystemExit as quiet:
            answer["left"] = quiet.code
        except Exception as error:
            answer |= {"error": str(error), "code": getattr(error, "exit_code", None)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    assert Path(__file__).name == "rank.py"
    main()
