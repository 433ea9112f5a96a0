"""Shared argument checks: one wording for every operator, and nothing that costs a training step.

Everything here reads shapes, dtypes and Python numbers only. No check looks at a tensor's values:
on a GPU that would wait for the device, and while exporting it would tie the graph to one example.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def wrong(argument: str, found: object, expected: str) -> ValueError:
    """The error of a bad argument: its name, what it was, what it has to be."""
    return ValueError(f"{argument} is {found}, expected {expected}")


def shape(x: Tensor) -> str:
    """A tensor's shape as messages show it."""
    return f"of shape {tuple(x.shape)}"


def check_float(argument: str, x: Tensor) -> None:
    """`x` holds floating-point numbers the operators compute with."""
    if x.dtype not in FLOATS:
        raise wrong(argument, f"of dtype {x.dtype}", "float32, bfloat16, float16 or float64")


def check_like(argument: str, x: Tensor, base: str, other: Tensor) -> None:
    """`x` has the dtype and the device of `other`, which the message calls `base`."""
    if x.dtype != other.dtype:
        raise wrong(argument, f"of dtype {x.dtype}", f"{other.dtype} as {base}")
    if x.device != other.device:
        raise wrong(argument, f"on {x.device}", f"{other.device} as {base}")


def check_shape(argument: str, x: Tensor, names: str, *sizes: int) -> None:
    """`x` has exactly these sizes; `names` is how the docstring writes them."""
    if x.shape != sizes:
        raise wrong(argument, shape(x), f"{names} = {sizes}")


def check_dropout(p: float, seed: Tensor | None, x: Tensor) -> None:
    """A probability in [0, 1) and, where it is not 0, a seed to draw the mask from."""
    if not 0.0 <= p < 1.0:
        raise wrong("dropout_p", p, "0 <= dropout_p < 1")
    if p > 0.0:
        check_seed(seed, x)


def check_seed(seed: Tensor | None, x: Tensor) -> None:
    """A () int64 tensor on the device of `x`."""
    if seed is None:
        raise wrong("seed", None, "a () int64 tensor, because dropout_p > 0")
    if seed.dtype != torch.int64 or seed.ndim != 0:
        raise wrong("seed", f"{seed.dtype} {shape(seed)}", "a () int64 tensor")
    if seed.device != x.device:
        raise wrong("seed", f"on {seed.device}", f"{x.device} as the first argument")
