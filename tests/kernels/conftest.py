"""The budget every operator is held to, and a dropout mask that owes nothing to ours."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Results = tuple[Tensor, ...]

# The only reasons for which a test of the kernels may be skipped, and what runs instead of it.
ALLOWED_SKIPS = {
    "no GPU on this machine": "the interpreter runs the same kernels; `gpu` is for what it cannot",
    "only where triton interprets": "test_gpu.py, in processes of their own",
    "needs two GPUs": "test_integration.py shows the launch on its tensors' device",
    "needs 60 GB of free GPU memory": "test_offsets.py reads 64-bit offsets off the compiler",
    "triton is not installed": "no kernel can run there, and the reference bodies are tested",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A skip for any other reason is a failure: what is not run is not proven."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason not in ALLOWED_SKIPS:
            report.outcome = "failed"
            report.longrepr = f"skipped because {reason!r}, which ALLOWED_SKIPS does not list"
    return report


@pytest.fixture(params=["plain", "operator"])
def path(request, monkeypatch) -> str:
    """Run a test twice: through the plain reference body, and through the registered operator."""
    if request.param == "operator":
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    return request.param


def error_budget(exact: Tensor, same_precision: Tensor) -> float:
    """The largest error allowed, by the one rule of README, "The idea"."""
    plain_error = (same_precision.double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    if same_precision.dtype == torch.float32:
        return max(2 * plain_error, 2e-5 * largest)
    return 2 * plain_error + torch.finfo(same_precision.dtype).eps * largest


def run(function: Callable[..., Results], inputs: Sequence[Tensor], dtype: torch.dtype) -> Results:
    """Results and gradients of `function` with every input in `dtype`.

    The results are weighted by fixed numbers, so that no gradient can hide behind a symmetry.
    """
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (
            result.double() * torch.randn(result.shape, generator=generator, dtype=torch.float64)
        ).sum()
        for result in results
    )
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return *(result.detach() for result in results), *gradients


@pytest.fixture
def check() -> Callable[..., None]:
    """check(function, oracle, inputs, dtype): results and every gradient within the budget.

    `inputs` are float64; `oracle` says what is exact in float64 and what the same maths costs in
    `dtype`.
    """

    def compare(
        function: Callable[..., Results],
        oracle: Callable[..., Results],
        inputs: Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        exact = run(oracle, inputs, torch.float64)
        same_precision = run(oracle, inputs, dtype)
        found = run(function, inputs, dtype)
        # A gradient that is exactly 0 leaves no budget of its own: the rounding of the others is.
        rounding = (
            4 * torch.finfo(dtype).eps * max(e.abs().max().item() for e in exact if e.numel())
        )
        for i, (a, e, s) in enumerate(zip(found, exact, same_precision, strict=True)):
            assert a.shape == e.shape, f"result {i}: shape {a.shape} is not {e.shape}"
            assert a.isfinite().all(), f"result {i} is not finite"
            if a.numel():
                error = (a.double() - e).abs().max().item()
                budget = max(error_budget(e, s), rounding)
                assert error <= budget, f"result {i}: error {error}, budget {budget}"

    return compare


def _philox(counter: list[int], key: list[int]) -> list[int]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b % 2**32, a >> 32 ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.fixture
def keeps() -> Callable[[int, float, int, int], bool]:
    """keeps(seed, p, index, plane): whether dropout keeps an element, by Python's own integers."""

    def kept(seed: int, p: float, index: int, plane: int = 0) -> bool:
        seed %= 2**64
        counter = [index % 2**32, index >> 32, plane, 0]
        return _philox(counter, [seed % 2**32, seed >> 32])[0] >= round(p * 2**32)

    return kept
