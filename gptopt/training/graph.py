"""`--cuda-graph`: a GPU's step recorded once and replayed, so that the host launches it as one.

Not yet measured on a GPU.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from gptopt.errors import UserError, first_line

Inputs = dict[str, Tensor]

_WARM_UP = 3  # steps before: kernels are compiled and libraries set up, which cannot be recorded


class StepGraph:
    """Takes steps: the first ones as they are, the rest as replays of one recording.

    Args:
        work: a whole step on the device, from inputs (and a seed among them) to the figures that it
            returns. It waits for nothing; what else it reads and writes stays where it is.
    """

    def __init__(self, work: Callable[[Inputs], Tensor]) -> None:
        self._work = work
        self._inputs: Inputs = {}
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self._figures = torch.empty(0)

    def step(self, inputs: Inputs) -> Tensor:
        """One step; its figures, which the next one leaves alone.

        Raises:
            UserError: the inputs are of another shape than the first ones, or a step like this one
                cannot be recorded.
        """
        self._place(inputs)
        self._steps += 1
        if self._steps <= _WARM_UP:
            return _apart(lambda: self._work(self._inputs))
        if self._replay is None:
            self._replay, self._figures = _record(lambda: self._work(self._inputs))
        self._replay()
        return self._figures.clone()

    def _place(self, inputs: Inputs) -> None:
        """Copy the inputs to where the recording reads them."""
        if not self._inputs:
            self._inputs = {name: value.clone() for name, value in inputs.items()}
            return
        for name, value in inputs.items():
            place = self._inputs[name]
            if place.shape != value.shape:
                raise UserError(
                    f"--cuda-graph: {name} has shape {tuple(value.shape)}, and the recorded step"
                    f" reads {tuple(place.shape)}; leave it out where batches differ in size"
                )
            place.copy_(value)


def _apart(work: Callable[[], Tensor]) -> Tensor:
    """Do it on a stream of its own, as a recording does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        # Its optimiser can be recorded, and is not yet.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable")
        figures = work()
    torch.cuda.current_stream().wait_stream(stream)
    figures.record_stream(torch.cuda.current_stream())
    return figures


def _record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(what does it again, where its figures then are); nothing is done yet."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads copy checkpoints and read batches meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            figures = work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"--cuda-graph: the step could not be recorded ({first_line(error)}); leave it out"
        ) from error
    return graph.replay, figures


def refuse_graph(
    device: torch.device, dtype: torch.dtype, *, ranks: int, accumulate: int, others: list[str]
) -> None:
    """Refuse what cannot be recorded, before anything is built.

    Args:
        device, dtype: of the run.
        ranks: processes that train together.
        accumulate: micro-batches of a step.
        others: options of the run that change what a step does on the host.

    Raises:
        UserError: one of them stands in the way.
    """
    obstacles = {
        f"--device {device}, it records the step of a GPU": device.type != "cuda",
        "--dtype float16, whose loss scale is the host's": dtype == torch.float16,
        "several ranks": ranks > 1,
        "several micro-batches a step (--accumulate)": accumulate > 1,
        " and ".join(others): bool(others),
    }
    for what, there in obstacles.items():
        if there:
            raise UserError(f"--cuda-graph: does not go with {what}; leave one of them out")
