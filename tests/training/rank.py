"""One of several ranks that tests start: does what each line of its stdin says, in JSON.

Starting processes takes longer than training tiny models, so the cases share them.
"""

import contextlib
import errno
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from gptopt.config import TrainOptions
from gptopt.training import train
from gptopt.training.session import Session
from gptopt.training.step import Stepper


@contextlib.contextmanager
def in_float64():
    """Weights, gradients and losses in float64, so that only the order of sums differs."""
    from gptopt.training.pretraining import NextToken

    build = NextToken.build
    with mock.patch.object(NextToken, "build", lambda *given: build(*given).double()):
        yield


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


CHANGES = {"float64": in_float64, "poisoned": poisoned, "full_disk": full_disk}


def do(options, changes):
    quick = [
        mock.patch("gptopt.training.run.matmul_peak", return_value=None),
        mock.patch("gptopt.training.run.draw_loss", return_value=False),
        *(CHANGES[name](**given) for name, given in changes.items()),
    ]
    with contextlib.ExitStack() as held:
        for patch in quick:
            held.enter_context(patch)
        return train(TrainOptions.model_validate(options))


def main():
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not disturb the answers
    for line in sys.stdin:
        case = json.loads(line)
        os.environ.update(case["environment"])
        answer = {}
        try:
            answer["result"] = do(case["options"], case["changes"])
        except SystemExit as quiet:
            answer["left"] = quiet.code
        except Exception as error:
            answer |= {"error": str(error), "code": getattr(error, "exit_code", None)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    assert Path(__file__).name == "rank.py"
    main()
