"""What this very machine can do: its copy bandwidth and its matrix product rate, measured."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gptopt.bench.timing import Spread, Subject, clock_of, free_memory

_COPY_BYTES = {"cuda": 2 << 30, "cpu": 32 << 20}  # of one of the two buffers
_PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}
_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """Bytes read and written per second by a large copy, operations per second of a product."""

    bytes_per_s: float
    flops_per_s: dict[str, float]  # by dtype name

    def ms(self, work: "Work", dtype: str) -> float:
        """The least time that the work can take: the longer of moving and computing."""
        rate = self.flops_per_s.get(dtype) or max(self.flops_per_s.values())
        return 1e3 * max(work.bytes / self.bytes_per_s, work.flops / rate)

    def as_json(self) -> dict[str, Any]:
        """The two figures as they stand in a machine line."""
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """The fewest operations and bytes that a call needs: each input read, each output written."""

    flops: float
    bytes: float


def measure_limits(device: torch.device, dtypes: list[torch.dtype]) -> Limits:
    """Measure both, some seconds in all.

    The copy counts bytes read plus bytes written; the products are square and of random numbers,
    which a GPU multiplies more slowly than zeros.
    """
    rates = {str(dtype).removeprefix("torch."): _product_rate(device, dtype) for dtype in dtypes}
    found = Limits(_copy_rate(device), rates)
    free_memory()
    return found


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _median_s(device, Subject("copy", lambda _: target.copy_(source)))
    return 2 * source.numel() * 4 / seconds


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = _PRODUCT_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, device=device, generator=generator).to(dtype)
    right = torch.randn(size, size, device=device, generator=generator).to(dtype)
    out = torch.empty_like(left)
    seconds = _median_s(device, Subject("product", lambda _: torch.mm(left, right, out=out)))
    return 2 * size**3 / seconds


def _median_s(device: torch.device, subject: Subject) -> float:
    clock = clock_of(device)
    clock.wall(subject)
    samples, until = [clock.time(subject, cold=False)], time.perf_counter() + _SECONDS
    while time.perf_counter() < until or len(samples) < 5:
        samples.append(clock.time(subject, cold=False))
    return Spread.of(samples).median_ms / 1e3
