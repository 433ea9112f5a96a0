"""Faster launch configurations for one machine: tried, timed, checked, and kept in its cache.

A configuration is kept only after its results were within the budget of `gptopt.kernels.proof`, on
the very case it was timed with. The cache lies beside the proofs' stamps and belongs, as they do,
to one GPU model, torch, triton and state of the sources. It is read once, at the first launch; one
that cannot be read or written costs a line in the log.
"""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptopt.kernels import launch, proof
from gptopt.kernels.launch import Config, Key
from gptopt.kernels.proof_cases import Case
from gptopt.kernels.tuning_cases import workloads

OPERATORS = ("attention", "layernorm", "ffn", "cross_entropy", "rotary", "attention_decode")
GAIN = 0.03  # what is not faster by this much is noise
_SECONDS = 90.0  # for one operator
_log = logging.getLogger("gptopt.kernels")

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Tuned:
    """One kernel's search on one machine.

    config: the fastest one that was right, or the one it had. ms, before_ms: time of the case it
    was tried with, with that configuration and with the one before. tried: candidates that ran.
    refused: why others were not taken, in words.
    """

    kernel: str
    dtype: str
    shape: str
    case: str
    config: Config
    ms: float
    before_ms: float
    tried: int
    refused: tuple[str, ...]

    @property
    def better(self) -> bool:
        """Whether the search found anything."""
        return self.ms < self.before_ms


def tune_all(
    device: torch.device | str, operators: Sequence[str] = OPERATORS
) -> dict[str, list[dict[str, Any]]]:
    """Tune every operator for `device` and keep what was found; a report that JSON can hold."""
    return {
        operator: [{**asdict(found), "better": found.better} for found in tune(operator, device)]
        for operator in operators
    }


def tune(
    operator: str,
    device: torch.device | str,
    *,
    cases: Sequence[Case] | None = None,
    timer: Timer | None = None,
    seconds: float = _SECONDS,
) -> list[Tuned]:
    """Search the configurations of the kernels that `operator` launches for each case.

    Args:
        operator: of OPERATORS.
        device: a GPU.
        cases: what is run and timed, forward and backward; None: those of a GPT in bfloat16.
        timer: milliseconds of a call; None: the median on the GPU, with a cold L2 cache.
        seconds: no candidate is started after this time.

    Raises:
        ValueError: there is no GPU to take the time of.
    """
    device = torch.device(device)
    if timer is None:
        if device.type != "cuda" or launch.INTERPRETED:
            raise ValueError(f"device is {device}, expected a GPU: the time of others says nothing")
        timer = _median_ms
    deadline = time.monotonic() + seconds
    found = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for case in workloads(operator, device) if cases is None else cases:
            run = _run_of(case)
            for key in _keys(run, operator):
                _log.info("tuning %s %s for %s", key[0], key[2], case.name)
                found.append(_search(case, run, key, launch.arch(device), timer, deadline))
    remember([result for result in found if result.better], device)
    return found


def candidates(config: Config) -> Iterator[Config]:
    """Neighbours of a configuration: a size halved or doubled, other warps, other stages."""
    for name, size in config.sizes.items():
        least = 16 if name.startswith("BLOCK") else 1
        if size >= 1 and size & (size - 1) == 0:  # others are choices, not sizes
            for other in (size // 2, size * 2):
                if other >= least:
                    sizes = {**config.sizes, name: other}
                    yield Config(sizes, config.num_warps, config.num_stages)
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if 1 <= warps <= 16:
            yield Config(config.sizes, warps, config.num_stages)
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 5:
            yield Config(config.sizes, config.num_warps, stages)


def recall(arch: str) -> dict[Key, Config]:
    """What was kept for this machine, if its architecture is `arch` and its GPU is in use."""
    if arch == "interpreter":
        device = torch.device("cpu")
    elif torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        return {}  # compiled ahead of time, for a chip that may be elsewhere
    if launch.arch(device) != arch:
        return {}
    return {_key(entry): _config(entry) for entry in _read(device)}


def remember(results: Sequence[Tuned], device: torch.device) -> None:
    """Add results to the cache of this machine, all of them or none."""
    entries = {_key(entry): entry for entry in _read(device)}
    for result in results:
        entry = {
            "kernel": result.kernel,
            "dtype": result.dtype,
            "shape": result.shape,
            **asdict(result.config),
            "ms": result.ms,
            "before_ms": result.before_ms,
            "case": result.case,
        }
        entries[_key(entry)] = entry
    if not results:
        return
    path = _path(device)
    text = {"machine": proof.machine(device), "entries": list(entries.values())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        proof._write(path, json.dumps(text, indent=1) + "\n")
    except OSError as error:
        _log.info("what the tuning found is not kept: %s", error)


def merged(table: dict[str, Any], operator: str, device: torch.device) -> dict[str, Any]:
    """The shipped table of `operator` with the entries of this machine's cache.

    An entry goes before the first one that fit its case until now, which it replaces if both are
    for the same arch, dtype and shape.
    """
    machine = proof.machine(device)
    kernels = {name: list(entries) for name, entries in table["kernels"].items()}
    changed = False
    for tuned in _read(device):
        owner, _, name = tuned["kernel"].partition(".")
        if owner != operator or name not in kernels:
            continue
        wanted = {"arch": machine["arch"], "dtype": tuned["dtype"], "shape": tuned["shape"]}
        entry: dict[str, Any] = {key: value for key, value in wanted.items() if value}
        entry |= {key: tuned[key] for key in ("sizes", "num_warps", "num_stages")}
        entries = kernels[name]
        place = next(i for i, old in enumerate(entries) if launch.fits(old, wanted))
        same = all(entries[place].get(key, "") == value for key, value in wanted.items())
        entries[place : place + same] = [entry]
        changed = True
    if not changed:
        return table
    source = f"{table['source']}; {machine['arch']} tuned on {machine['name']}"
    return {**table, "source": source, "kernels": kernels}


def _search(
    case: Case, run: Callable[[], Any], key: Key, arch: str, timer: Timer, deadline: float
) -> Tuned:
    kernel, dtype, shape = key
    before = launch.choose(kernel, arch, dtype, shape)
    before_ms = timer(run)
    timed: list[tuple[float, Config]] = []
    refused: list[str] = []
    for candidate in candidates(before):
        if time.monotonic() > deadline:
            refused.append("the time was over")
            break
        with _forced(key, arch, candidate):
            try:
                timed.append((timer(run), candidate))
            except Exception as error:  # too much shared memory, a size the compiler refuses, ...
                refused.append(f"{candidate.options}: {type(error).__name__}")
    best, ms = before, before_ms
    for candidate_ms, candidate in sorted(timed, key=lambda pair: pair[0]):
        if candidate_ms > before_ms * (1 - GAIN):
            break
        with _forced(key, arch, candidate):
            reason = _wrong(case)
        if reason is None:
            best, ms = candidate, candidate_ms
            launch.tuned(arch)[key] = candidate
            launch.choose.cache_clear()
            break
        refused.append(f"{candidate.options}: {reason}")
    name = str(dtype).removeprefix("torch.")
    return Tuned(kernel, name, shape, case.name, best, ms, before_ms, len(timed), tuple(refused))


def _wrong(case: Case) -> str | None:
    """Why the results of a case are not to be trusted as the kernels are now; None if they are."""
    try:
        share, what = proof._share_of_budget(case)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:200]}"
    return None if share <= 1.0 else what


@contextmanager
def _forced(key: Key, arch: str, config: Config) -> Iterator[None]:
    """Inside, launches of `key` use `config`."""
    table = launch.tuned(arch)
    before = table.get(key)
    table[key] = config
    launch.choose.cache_clear()
    try:
        yield
    finally:
        del table[key]
        if before is not None:
            table[key] = before
        launch.choose.cache_clear()


def _keys(run: Callable[[], Any], operator: str) -> list[Key]:
    """The configurations that a run asks for."""
    launch.ASKED.clear()
    launch.choose.cache_clear()
    run()
    prefix = operator.removesuffix("_decode") + "."
    return sorted((key for key in launch.ASKED if key[0].startswith(prefix)), key=str)


def _run_of(case: Case) -> Callable[[], Any]:
    """The case's Triton body, forward and backward, on inputs that are there already."""
    leaves = [x.to(case.dtype, copy=True).requires_grad_() for x in case.inputs]
    function = case.function("triton")

    def run() -> None:
        results = [x for x in function(*leaves) if x.requires_grad]
        if results:
            torch.autograd.grad([x.float().sum() for x in results], leaves, allow_unused=True)

    return run


def _median_ms(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    ms = do_bench(run, warmup=20, rep=60, return_mode="median")
    assert isinstance(ms, float)
    return ms


def _path(device: torch.device) -> Path:
    machine = proof.machine(device)
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
    return proof.cache_folder() / "tuned" / f"{machine['arch']}-{key[:20]}.json"


def _read(device: torch.device) -> list[dict[str, Any]]:
    """The entries of this machine's cache; none where it is missing, unreadable or broken."""
    path = _path(device)
    try:
        cache = json.loads(path.read_text(encoding="utf-8"))
        if cache["machine"] != proof.machine(device):
            raise ValueError("it is of another machine")
        entries: list[dict[str, Any]] = cache["entries"]
        for entry in entries:
            _key(entry), _config(entry)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.info("%s is no cache of configurations (%s): the shipped ones run", path, error)
        return []
    return entries


def _key(entry: dict[str, Any]) -> Key:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{entry['dtype']} is no dtype")
    return str(entry["kernel"]), dtype, str(entry["shape"])


def _config(entry: dict[str, Any]) -> Config:
    config = Config(dict(entry["sizes"]), entry["num_warps"], entry["num_stages"])
    numbers = itertools.chain(config.sizes.values(), (config.num_warps, config.num_stages))
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"{entry['kernel']} has a size that is no integer")
    return config
