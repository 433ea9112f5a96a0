"""A verb that trains, and kills itself at a chosen moment, as kill -9 from outside would.

python -P -m gptopt.bench.dying '{"step": 7, "micro": 1, "delay_ms": 3, "rank": 0}' train ...

The moment is so many milliseconds after a micro-batch of a step begins; steps and micro-batches
count from 0. Of several ranks one dies.
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any

from torch import Tensor

from gptopt.cli import main
from gptopt.training.step import Stepper


def die_at(moment: dict[str, Any]) -> None:
    """Kill this process at a moment of its run."""
    forward, begun = Stepper._forward_backward, {"step": -1, "micro": -1}

    def deadly(self: Stepper, *given: Any) -> Tensor:
        step = self.state.step
        begun["micro"] = begun["micro"] + 1 if begun["step"] == step else 0
        begun["step"] = step
        here = (step, begun["micro"], self.session.world.rank)
        if here == (moment["step"], moment["micro"], moment["rank"]):
            threading.Thread(target=_kill, args=(moment["delay_ms"] / 1000,), daemon=True).start()
        return forward(self, *given)

    setattr(Stepper, "_forward_backward", deadly)  # noqa: B010 - mypy takes no other method


def _kill(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_at(json.loads(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
