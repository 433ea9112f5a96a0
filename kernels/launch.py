"""What every Triton kernel here shares: device helpers, launch configurations, ahead-of-time cases.

Imported by `kernels/<op>/triton.py` alone, which is imported only where it is chosen: this is the
first module that loads triton. A kernel's module gives three things:

    @jit functions and launchers, the operator's bodies, entered by `library.register_triton`
    supports(...) -> str | None    why the kernels cannot run on these arguments
    aot_cases() -> list[AotCase]   every specialisation to compile ahead of time

Launch configurations are data, `kernels/configs/<op>.json`:

    {"source": "unmeasured heuristic",
     "kernels": {"fwd": [{"arch": "sm_90", "dtype": "bfloat16", "shape": "d64",
                          "sizes": {"BLOCK_M": 128}, "num_warps": 8, "num_stages": 3}, ...]}}

The first entry that fits wins; an absent key fits all, and a shape fits a class that has all its
words ("d64" fits "d64 masked"). Architectures are sm_80, sm_90, sm_100, ..., gfx942 and
"interpreter". The last entry of a kernel fits everything, so it has to stay within the smallest
chip: 99 KiB of shared memory.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

_CONFIGS = Path(__file__).parent / "configs"
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def jit(function: Callable[..., Any], /, **options: Any) -> Any:
    """`triton.jit`, typed. Arguments are `tl.tensor` or `tl.constexpr`: triton reads them."""
    return triton.jit(function, **options)


# What triton was when it was imported, not what the environment says now: its own library
# functions were built then, and a kernel of the other kind could not call them.
INTERPRETED: bool = isinstance(tl.philox, InterpretedFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)


# Device helpers


@jit
def dot_operand(x: tl.tensor) -> Any:
    """`x` as tl.dot takes it: the interpreter's dot reads bf16 bits as integers, so float32 there.

    Both operands of one dot go through here.
    """
    if _INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@jit
def cast(x: tl.tensor, dtype: tl.constexpr) -> Any:
    """`x` in `dtype`, to the nearest even, also where the interpreter would cut float32 to bf16."""
    if _INTERPRETED and (dtype == tl.bfloat16 and x.dtype == tl.float32):
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def keep_mask(
    seed_ptr: tl.tensor, low: tl.tensor, high: tl.tensor, plane: tl.tensor, threshold: tl.tensor
) -> Any:
    """True where dropout keeps an element: kernels/philox.py's mask, bit for bit.

    seed_ptr: () int64. low, high, plane: the counter's words, int32 or uint32, blocks that
    broadcast (scalars too, if one of them is a block). threshold: `dropout_threshold(p)`.
    """
    low = low.to(tl.uint32, bitcast=True)
    high = (low * 0) + high.to(tl.uint32, bitcast=True)
    plane = (low * 0) + plane.to(tl.uint32, bitcast=True)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, plane, low * 0)
    return word.to(tl.int64) >= threshold


@jit
def keep_linear(seed_ptr: tl.tensor, index: tl.tensor, threshold: tl.tensor) -> Any:
    """`keep_mask` of a tensor's elements by their row-major index, a block of int64."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    return keep_mask(seed_ptr, low, high, low * 0, threshold)


@jit
def product(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> Any:
    """`acc` (or None) plus a @ b, summed in float32.

    Operands in float32 are read into registers whole, and the scheduler fetches those of the next
    product early: two in flight spill (head size 256: 350 bytes a thread). The barrier parts them.
    """
    if a.dtype == tl.float32:
        tl.debug_barrier()
    return tl.dot(dot_operand(a), dot_operand(b), acc, input_precision="ieee")


def dropout_threshold(p: float) -> int:
    """The smallest first Philox word that dropout with probability `p` keeps."""
    return round(p * 2**32)


# The host side


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: block sizes by argument name, warps and pipeline stages."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """All of it as the keyword arguments of a launch."""
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


Key = tuple[str, torch.dtype, str]  # kernel, dtype, shape class
ASKED: set[Key] = set()  # what `choose` was asked for; `gptopt.kernels.tuning` reads it


@functools.cache
def choose(kernel: str, arch: str, dtype: torch.dtype, shape_class: str = "") -> Config:
    """The configuration of `kernel`, "<op>.<kernel>" as in "attention.fwd".

    What this machine's own tuning found and checked comes first, then the shipped table.

    Raises:
        KeyError: no entry of the table fits.
    """
    key = (kernel, dtype, shape_class)
    ASKED.add(key)
    return tuned(arch).get(key) or shipped(kernel, arch, dtype, shape_class)


@functools.cache
def tuned(arch: str) -> dict[Key, Config]:
    """What the tuning of this machine left for `arch`, read once."""
    from gptopt.kernels import tuning

    return tuning.recall(arch)


def shipped(kernel: str, arch: str, dtype: torch.dtype, shape_class: str = "") -> Config:
    """The entry of the shipped table, as in `choose`."""
    operator, _, name = kernel.partition(".")
    wanted = {"arch": arch, "dtype": str(dtype).removeprefix("torch."), "shape": shape_class}
    for entry in _table(operator)["kernels"][name]:
        if fits(entry, wanted):
            return Config(entry.get("sizes", {}), entry["num_warps"], entry["num_stages"])
    raise KeyError(f"kernels/configs/{operator}.json: no entry of {name} fits {wanted}")


def fits(entry: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Whether an entry of a table is for this arch, dtype and shape class."""
    known = all(entry.get(key, wanted[key]) == wanted[key] for key in ("arch", "dtype"))
    return known and set(entry.get("shape", "").split()) <= set(wanted["shape"].split())


@functools.cache
def _table(operator: str) -> dict[str, Any]:
    text = (_CONFIGS / f"{operator}.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@functools.cache
def arch(device: torch.device) -> str:
    """ "sm_90" and the like, "gfx942" and the like, or "interpreter"."""
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of `device`; 2 in the interpreter, so that persistent loops are walked."""
    if INTERPRETED or device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the device of `x`, whichever device is current.

    No grid dimension may be 0. The big one comes first: y and z end at 65535.
    """
    assert all(grid)
    assert all(size <= 65535 for size in grid[1:])
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


# Ahead of time


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel, as a launch would make it.

    kernel: the @jit function.
    arguments: by name, for every argument that is no constexpr: "*bf16" is a pointer (taken to be
        divisible by 16, as torch allocates), "i32" or "i64" an integer, "i32:16" one divisible by
        16, "fp32" a float; 1 is an integer known to be 1, and None an absent pointer.
    constexprs: by name, block sizes without.
    config: the configuration, from `choose(kernel, arch, ...)`; its sizes are constexprs.
    label: dtype and shape as they shall stand in the table, "bfloat16 d64 causal".
    dot: it has a matrix product that must use the matrix unit of the chip.
    tile: the block size that says how many rows that product has.
    archs: where it is compiled; empty is everywhere.
    """

    operator: str
    kernel: Any
    arguments: Mapping[str, str | int | None]
    constexprs: Mapping[str, Any]
    config: Callable[[str], Config]
    label: str
    dot: bool = False
    tile: str = "BLOCK_M"
    archs: tuple[str, ...] = ()


def pointer(dtype: torch.dtype) -> str:
    """How `AotCase.arguments` writes a pointer to elements of `dtype`."""
    return "*" + _NAMES[dtype]
