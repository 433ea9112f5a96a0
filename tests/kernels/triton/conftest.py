"""The Triton bodies against the reference: in the interpreter, or on a GPU where there is one.

Triton decides when it is imported whether it interprets, so this folder has a process of its own:

    TRITON_INTERPRET=1 pytest tests/kernels/triton      on the CPU
    GPTOPT_TEST_GPU=1  pytest tests/kernels/triton      on the GPU
"""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or os.environ.get("GPTOPT_TEST_GPU") == "1" else ["*"]

Results = tuple[Tensor, ...]


@pytest.fixture
def device() -> torch.device:
    """Where the kernels under test run: the CPU where they are interpreted."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch) -> None:
    """Fresh memory holds NaN (or the largest integer): what a kernel forgets to write shows."""

    def poisoned(function):
        def make(*args, **kwargs):
            x = function(*args, **kwargs)
            if x.device.type == "meta" or type(x) is not Tensor or torch.compiler.is_compiling():
                return x
            if x.dtype.is_floating_point:
                return x.fill_(float("nan"))
            return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

        return make

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def run(function: Callable[..., Results], inputs: Sequence[Tensor], dtype: torch.dtype) -> Results:
    """Results of `function` and its gradients, all in float64, with every input in `dtype`.

    An input's strides are kept, gaps included. The results are weighted by fixed numbers, so that
    no gradient can hide behind a symmetry; a result without elements has no weight.
    """
    leaves = [_like(x, dtype) for x in inputs]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    pairs = [(result, _weight(result, generator)) for result in results]
    used = [(result, weight) for result, weight in pairs if result.requires_grad]
    gradients = torch.autograd.grad(
        [result for result, _ in used],
        leaves,
        [weight for _, weight in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return tuple(x.detach().double() for x in (*results, *gradients))


def _weight(result: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers that every dtype holds exactly."""
    weight = torch.randint(-64, 65, result.shape, generator=generator) / 32
    return weight.to(result.device, result.dtype)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf with the values and the strides of `x`."""
    storage = torch.zeros(x.untyped_storage().nbytes() // x.itemsize, dtype=dtype, device=x.device)
    leaf = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    return leaf.copy_(x.detach()).requires_grad_()


@pytest.fixture
def check() -> Callable[..., None]:
    """check(function, oracle, inputs, dtype): results and every gradient by the rule of the house.

    `inputs` are float64, any strides, and rounded to `dtype` before anything else; both functions
    take them and return a tuple. `oracle` is the reference body, exact in float64. Allowed is, for
    each result, twice the oracle's own error in `dtype` plus one rounding band of the largest
    value; in float32 no less than 2e-5 of that value.
    """

    def compare(
        function: Callable[..., Results],
        oracle: Callable[..., Results],
        inputs: Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        inputs = [_like(x, dtype) for x in inputs]
        exact = run(oracle, inputs, torch.float64)
        same = run(oracle, inputs, dtype)
        found = run(function, inputs, dtype)
        eps = torch.finfo(dtype).eps
        sizes = [e.abs().nan_to_num(posinf=0.0).max().item() if e.numel() else 0.0 for e in exact]
        for i, (a, e, s) in enumerate(zip(found, exact, same, strict=True)):
            assert a.shape == e.shape, f"result {i}: shape {tuple(a.shape)} is not {e.shape}"
            finite = e.isfinite()  # an lse of -inf is -inf everywhere
            assert torch.equal(a[~finite], e[~finite]), f"result {i}: not the same infinities"
            assert a[finite].isfinite().all(), f"result {i} is not finite"
            if not finite.any():
                continue
            error = (a - e)[finite].abs().max().item()
            plain = (s - e)[finite].abs().max().item()
            floor = 2e-5 * sizes[i] if dtype == torch.float32 else 0.0
            # What is exactly 0 leaves no budget of its own: the rounding of the others is.
            budget = max(2 * plain + eps * sizes[i], floor, eps * max(sizes))
            assert error <= budget, f"result {i}: error {error}, budget {budget}"

    return compare
