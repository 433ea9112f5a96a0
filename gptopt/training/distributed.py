"""The processes that train one model together: who they are and how they agree.

torchrun starts them; torch.distributed connects them. What they say to each other beside gradients
(signals, clocks, errors, paths) goes over gloo groups on the CPU as numbers and JSON, so no GPU
ever waits for it.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]  # not in stubs

from gptopt.config import LoopOptions
from gptopt.errors import CheckFailed, Interrupted, UserError, first_line

Parallel = Literal["none", "ddp", "fsdp"]
T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # for work of rank 0 alone, such as tokenising; its death ends it
_TELL_S = 1.0  # a rank whose line another one tells leaves it time to: torchrun ends the rest


class Group:
    """Some processes that exchange small JSON values over the CPU; alone where there is none."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def leave(self) -> None:
        """Exchange nothing more; all processes must call it, with nothing under way."""
        self._group = None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The same for torch; None where this process is alone."""
        return self._group

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.all(value)[0]

    def all(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks; JSON-able."""
        if self._group is None:
            return [value]
        size = self._group.size()
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(size, dtype=torch.int64)
        lengths[self._group.rank()] = len(text)
        dist.all_reduce(lengths, group=self._group)
        longest = int(lengths.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size)]
        dist.all_gather(texts, padded, group=self._group)
        return [
            json.loads(bytes(text[: int(length)].tolist()))
            for text, length in zip(texts, lengths, strict=True)
        ]

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each number over the ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: list[float]) -> list[float]:
        """The sum of each number over the ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: list[float], how: Any) -> list[float]:
        if self._group is None:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, how, group=self._group)
        return numbers.tolist()


@dataclass(frozen=True)
class World:
    """This process among those that train together; by default it is alone.

    Attributes:
        rank, size: which of how many.
        parallel: ddp (each holds the whole model), fsdp (each holds a part), none (alone).
        control: for what all say at every step.
        patient: for waiting until rank 0 has prepared something.
        saving: for the threads that write checkpoints.
    """

    rank: int = 0
    size: int = 1
    parallel: Parallel = "none"
    control: Group = field(default_factory=Group)
    patient: Group = field(default_factory=Group)
    saving: Group = field(default_factory=Group)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self.parallel == "fsdp"

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work()` returns on rank 0, where alone it is done; JSON-able.

        Raises:
            UserError: the one that rank 0 met, on every rank.
        """
        answer: Any = None
        if self.is_first:
            try:
                answer = {"value": work()}
            except UserError as error:
                answer = {"error": str(error), "exit_code": error.exit_code}
                if self.size == 1:
                    raise
        answer = self.patient.from_first(answer)
        if "error" in answer:
            met = UserError(answer["error"])
            met.exit_code = answer["exit_code"]
            raise met
        return answer["value"]  # type: ignore[no-any-return]  # sent as JSON

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, on its device and with no wait for it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value


ALONE = World()


def micro_batches(sequences: int, batch_size: int, world: int) -> int:
    """Into how many micro-batches a step's sequences are cut: as few as `batch_size` allows.

    What a step reads does not depend on how many ranks share it.

    Raises:
        UserError: there are more ranks than sequences.
    """
    if sequences < world:
        raise UserError(
            f"the run has {sequences} sequences a step, which {world} ranks cannot share; start at"
            f" most {sequences}"
        )
    counts = [n for n in range(1, sequences // world + 1) if sequences % n == 0]
    fitting = (n for n in counts if -(-sequences // n // world) <= batch_size)
    return next(fitting, counts[-1])


@dataclass(frozen=True)
class Launch:
    """What torchrun says about a process that it started."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launch | None:
    """How torchrun started this process; None where it did not.

    Raises:
        UserError: its variables are there in part only.
    """
    if "WORLD_SIZE" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        return Launch(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']}, but not all of"
            f" {', '.join(names)} as numbers ({error}); start with torchrun, or unset it"
        ) from None


def rank_device(name: str, launch: Launch | None) -> str:
    """The device of this rank: `--device cuda` means one GPU each.

    Raises:
        UserError: there are more ranks than GPUs, or the device cannot be shared out.
    """
    if launch is None or launch.size == 1:
        return name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    if name != "cuda":
        raise UserError(
            f"--device {name}: {launch.size} ranks cannot share it; --device cuda gives each rank"
            f" a GPU of its own, --device cpu none"
        )
    if launch.local_size > torch.cuda.device_count():
        raise UserError(
            f"torchrun started {launch.local_size} ranks on this machine, but torch sees"
            f" {torch.cuda.device_count()} CUDA devices; give --nproc-per-node as many as there are"
        )
    return f"cuda:{launch.local_rank}"


@contextlib.contextmanager
def join_world(options: LoopOptions) -> Iterator[World]:
    """Connect this process with the others that torchrun started.

    An error that several ranks meet is told by one of them; the others leave with its exit code.

    Raises:
        UserError: --parallel without torchrun, or more ranks than GPUs.
        CheckFailed: another rank ended or did not answer within --timeout-seconds.
    """
    launch = launched()
    if launch is None and options.parallel != "auto":
        raise UserError(
            f"--parallel {options.parallel} needs several processes; start them with torchrun"
            f" --no-python --nproc-per-node N gptopt train ..."
        )
    if launch is None or (launch.size == 1 and options.parallel != "fsdp"):
        yield World()
        return
    timeout = timedelta(seconds=options.timeout_seconds)
    store = _store(launch, timeout)
    logger = logging.getLogger("gptopt")
    level = logger.level
    if launch.rank > 0:  # what rank 0 says is said for all
        logger.setLevel(logging.ERROR)
    try:
        device = torch.device(rank_device(options.device, launch))
        _connect(launch, store, device, timeout)
        groups = [_gloo(timeout), _gloo(_PATIENCE), _gloo(_PATIENCE)]
        parallel: Parallel = "fsdp" if options.parallel == "fsdp" else "ddp"
        try:
            yield World(launch.rank, launch.size, parallel, *groups)
        except Interrupted:  # on all ranks at once, as the end is
            _part(groups)
            raise
        _part(groups)
    except UserError as error:
        _tell_once(store, error)
        raise
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        lost = CheckFailed(
            f"{options.out}: another rank ended, or did not answer in {options.timeout_seconds:g} s"
            f" ({first_line(error)[:200]}); its own line says why, then --resume"
        )
        _tell_once(store, lost)
        raise lost from None
    finally:
        logger.setLevel(level)
        # After an error NCCL would wait for ranks that are gone; the process's end ends it.
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


def _part(groups: list[Group]) -> None:
    """Leave the other ranks when all have come to their end.

    A group's own threads may still hold tensors of what was exchanged last, and a thread that lets
    go of one while Python ends aborts the process. They are waited for once nobody refers to it.
    """
    for group in groups:
        group.leave()
    dist.destroy_process_group()


def _store(launch: Launch, timeout: timedelta) -> Store:
    try:
        found, _, _ = next(rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {launch.rank} of {launch.size} cannot reach the others ({first_line(error)});"
            f" start all of them with torchrun"
        ) from None
    store: Store = found
    return store


def _connect(launch: Launch, store: Store, device: torch.device, timeout: timedelta) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=PrefixStore("gptopt", store),
        rank=launch.rank,
        world_size=launch.size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )


def _gloo(timeout: timedelta) -> Group:
    return Group(dist.new_group(backend="gloo", timeout=timeout))


def _is_loss(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def _tell_once(store: Store, error: UserError) -> None:
    """Leave quietly where another rank has claimed this line."""
    try:
        claims = store.add(f"told/{error}", 1)
    except RuntimeError:  # the store went with its host: better told twice than never
        return
    if claims > 1:
        time.sleep(_TELL_S)
        raise SystemExit(error.exit_code) from None
