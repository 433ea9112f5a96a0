"""The Triton bodies against the reference: in the interpreter, or on a GPU where there is one.

Triton decides when it is imported whether it interprets, so this folder has a process of its own:

    TRITON_INTERPRET=1 pytest tests/kernels/triton      on the CPU
    GPTOPT_TEST_GPU=1  pytest tests/kernels/triton      on the GPU
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gptopt.kernels import attention, attention_decode, cross_entropy, ffn, layernorm, rotary

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or os.environ.get("GPTOPT_TEST_GPU") == "1" else ["*"]

if INTERPRETED and torch.cuda.is_available():
    collect_ignore = ["test_gpu.py"]

Results = tuple[Tensor, ...]


def pytest_collection_modifyitems(items) -> None:
    """Time on a GPU may end early: what only a GPU shows comes first, what compiles most last."""
    if os.environ.get("GPTOPT_TEST_GPU") != "1":
        return
    last = ("test_properties", "test_aot", "test_offsets")

    def turn(item) -> int:
        if item.path.stem in last:
            return 3
        if "room" in item.fixturenames:
            return 2
        return 0 if item.get_closest_marker("gpu") else 1

    items.sort(key=turn)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels under test run: the CPU where they are interpreted."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def _context() -> None:
    """The thread of backward passes has a CUDA context: cuBLAS warns where it is the first to ask.

    Warnings are errors here.
    """
    if not INTERPRETED:
        torch.ones(2, device="cuda", requires_grad=True).sum().backward()


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


@dataclass
class Call:
    """One call of an operator as a model makes it: `function(impl)` takes the leaves."""

    operator: str
    leaves: list[Tensor]
    function: Callable[[str], Callable[..., Results]]
    cache: tuple[Tensor, ...] = ()


@pytest.fixture
def deterministic() -> Callable[[bool], contextlib.AbstractContextManager[None]]:
    """deterministic(wanted): torch asks for repeatable operators inside, or does not."""
    return _deterministic


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted)
    # Fresh memory would be filled, and the poison of this folder with it.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def operators(device) -> Callable[..., dict[str, Call]]:
    """operators(T, dtype): a call of each operator on T tokens, the same every time."""

    def make(T: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
        return _calls(T, device, dtype)

    return make


def _calls(T: int, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(3)
    B, H, K, D, F, V = 2, 4, 2, 16, 40, 50
    C = H * D

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator) / 2
        return x.to(device, dtype).requires_grad_()

    def heads(fused: Tensor) -> list[Tensor]:
        parts = fused.split((H * D, K * D, K * D), dim=-1)
        return [x.unflatten(-1, (-1, D)).transpose(1, 2) for x in parts]

    fused = B, T, (H + 2 * K) * D
    seed = torch.tensor(2**40 + 9, device=device)
    real = torch.ones(B, T, dtype=torch.bool, device=device)
    real[0, : T // 3] = False
    everything = {
        "key_mask": real,
        "doc_ids": (torch.arange(B * T, device=device) // (T // 2 + 1)).view(B, T),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0], device=device),
        "dropout_p": 0.2,
        "seed": seed,
        "window": T // 2 + 1,
        "softcap": 3.0,
    }
    angle = torch.randn(1, T, D // 2, generator=generator).to(device)
    targets = torch.randint(0, V, (B, T), generator=generator).to(device)
    targets[0, 0] = -100
    cache = (torch.zeros(B, K, 3 * T, D), torch.zeros(B, K, 3 * T, D))
    cache = tuple(x.to(device, dtype) for x in cache)
    filled = torch.tensor([2 * T, 1], device=device)

    def attend(impl: str, **options: Any) -> Callable[..., Results]:
        def call(x: Tensor) -> Results:
            found = attention(*heads(x), impl=impl, **options)
            return found.out, found.lse

        return call

    def norm(impl: str) -> Callable[..., Results]:
        options = {"dropout_p": 0.2, "seed": seed, "impl": impl}
        return lambda x, w, b, r: layernorm(x, w, b, r, **options)

    def feed(impl: str) -> Callable[..., Results]:
        return lambda x, w, b, g: (ffn(x, w, b, activation="swiglu", gate_weight=g, impl=impl),)

    def loss(impl: str) -> Callable[..., Results]:
        options = {"z_loss": 1e-3, "label_smoothing": 0.1, "impl": impl}
        return lambda x, w: (cross_entropy(x, w, targets, **options),)

    def turn(impl: str) -> Callable[..., Results]:
        return lambda x: rotary(*heads(x)[:2], angle.cos(), angle.sin(), impl=impl)

    def decode(impl: str) -> Callable[..., Results]:
        return lambda x: (attention_decode(*heads(x), cache, filled, impl=impl),)

    return {
        "attention": Call("attention", [leaf(*fused)], attend),
        "attention with all": Call("attention", [leaf(*fused)], partial(attend, **everything)),
        "layernorm": Call("layernorm", [leaf(B, T, C), leaf(C), leaf(C), leaf(B, T, C)], norm),
        "ffn": Call("ffn", [leaf(B, T, C), leaf(F, C), leaf(F), leaf(F, C)], feed),
        "cross_entropy": Call("cross_entropy", [leaf(B, T, C), leaf(V, C)], loss),
        "rotary": Call("rotary", [leaf(*fused)], turn),
        "attention_decode": Call("attention_decode", [leaf(*fused).detach()], decode, cache),
    }
