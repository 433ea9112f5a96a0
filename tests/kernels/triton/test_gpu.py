"""What only a GPU can show: captured graphs, no waiting, 64-bit offsets, streams, the same bits."""

import gc
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptopt.kernels import (
    StaticCache,
    attention,
    attention_decode,
    cross_entropy,
    ffn,
    layernorm,
    philox,
    proof,
    rotary,
    select,
)

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
BEYOND = 2**31  # what 32 bits can count
NAMES = [
    "attention",
    "attention with all",
    "layernorm",
    "ffn",
    "cross_entropy",
    "rotary",
    "attention_decode",
]


@pytest.fixture(params=NAMES)
def call(request, operators):
    """One operator after the other, its kernels compiled."""
    call = operators(70, BF16)[request.param]
    run(call)
    torch.cuda.synchronize()
    return call


def run(call, impl="triton") -> tuple[Tensor, ...]:
    """The results of a call and its gradients, of weights that need no copy from the host."""
    results = call.function(impl)(*call.leaves)
    used = [x for x in results if x.requires_grad]
    if not used:
        return tuple(results)
    weights = [x.detach().clamp(-9, 9) for x in used]
    gradients = torch.autograd.grad(used, call.leaves, weights)
    return (*(x.detach() for x in results), *gradients)


def same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.equal(b)  # -inf, of a row that sees no key, is equal to itself


def close(found, expected, share=0.02) -> None:
    """To a share of the largest value: cuBLAS may choose another product where little is left."""
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach().float(), b.detach().float()
        largest = b.nan_to_num(neginf=0.0).abs().max().item()
        torch.testing.assert_close(a, b, rtol=share, atol=share * largest)


def test_nothing_waits_for_the_device(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        run(call)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_says_what_eager_says_of_new_inputs(call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call)
    for _ in range(2):
        with torch.no_grad():
            for leaf in call.leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        replayed = [x.clone() for x in captured]
        close(replayed, run(call))


def test_ten_runs_give_the_same_bits(call):
    if call.operator == "attention":
        return  # promised only where torch is asked for it: the next test
    expected = run(call)
    for _ in range(10):
        same(run(call), expected)


@pytest.mark.parametrize("name", ["attention", "attention with all"])
def test_attention_is_deterministic_where_torch_is_asked_to_be(operators, name):
    call = operators(517, BF16)[name]
    torch.use_deterministic_algorithms(True)
    try:
        expected = run(call)
        for _ in range(5):
            same(run(call), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_streams_side_by_side(call):
    expected = run(call)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    # A decode writes its cache: two at once would race, and each says the same alone.
    for stream in streams[: 1 if call.cache else 3]:
        with torch.cuda.stream(stream):
            found.append(run(call))
    torch.cuda.synchronize()
    for results in found:
        close(results, expected)


def test_another_device_than_the_current_one(call):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = run(call)
    with torch.cuda.device(1):
        close(run(call), expected)


def test_results_are_those_of_the_reference_at_a_real_size(call):
    close(run(call), run(call, "reference"), share=0.05)


@pytest.mark.parametrize("operator", select.OPERATORS)
def test_every_operator_is_proven_here(operator):
    result = proof.prove(operator, torch.device("cuda", 0))
    assert result.passed, result.reason


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "kernels.cross_entropy(x, x, torch.full((4,), 99, device='cuda'), impl='triton')",
            "outside the vocabulary",
        ),
        (
            "cache = kernels.StaticCache(1, 1, 1, 4, 16, device='cuda'); q = x.view(1, 1, 4, 16);"
            "cache.advance(2);"
            "kernels.attention_decode(q, q, q, cache[0], cache.lengths, impl='triton')",
            "a cache row is full",
        ),
    ],
)
def test_an_index_outside_is_an_assertion_of_the_device(code, message):
    """In a process of its own: after such an assertion no kernel runs."""
    code = (
        "import torch; from gptopt import kernels;"
        f"x = torch.randn(4, 16, device='cuda'); {code}; torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_DEBUG": "1"},
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


# Beyond 2^31 elements. Rows are compared where 32 bits would have gone around.


@pytest.fixture
def room():
    """At most 60 GB are in use at a time, by one process of several, and given back."""
    import fcntl

    with Path(tempfile.gettempdir(), "gptopt-test-room.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 60e9:
            pytest.skip("needs 60 GB of free GPU memory")
        torch.cuda.reset_peak_memory_stats()
        yield
        peak = torch.cuda.max_memory_allocated()
        gc.collect()
        torch.cuda.empty_cache()
        assert peak < 60e9


def large(*shape: int) -> Tensor:
    """bfloat16, random, a leaf."""
    return torch.empty(shape, dtype=BF16, device="cuda").normal_().requires_grad_()


def near(found: Tensor, expected: Tensor) -> None:
    close([found], [expected], share=0.03)


def last(x: Tensor, n: int = 3) -> Tensor:
    return x.detach()[-n:].clone().requires_grad_()


@pytest.mark.parametrize("strided", [False, True])
def test_layernorm_of_many_elements(room, strided):
    C = 4096
    N = BEYOND // C + 37
    x = large(N, C)
    residual = large(N, 2 * C)[:, C:].detach() if strided else large(N, C).detach()
    residual.requires_grad_()
    weight, bias = large(C), large(C)
    seed = torch.tensor(2**40 + 1, device="cuda")
    y, h = layernorm(x, weight, bias, residual, impl="triton")
    gx, gbias, gr = torch.autograd.grad(y, (x, bias, residual), torch.ones_like(y))
    near(gr[-3:], gx[-3:])
    few = [last(x), weight, bias, last(residual)]
    ye, he = layernorm(*few, impl="reference")
    near(y[-3:], ye)
    near(h[-3:], he)
    near(gx[-3:], torch.autograd.grad(ye, few[0], torch.ones_like(ye))[0])
    near(gbias, torch.full_like(gbias, N))
    del y, h, gx, gr
    _, h = layernorm(x.detach(), None, None, dropout_p=0.5, seed=seed, impl="triton")
    index = torch.arange(N * C - C, N * C, device="cuda")
    keep = philox.keep_mask(seed, 0.5, index & 0xFFFFFFFF, index >> 32, torch.zeros_like(seed))
    assert torch.equal(h[-1] != 0, keep & (x[-1] != 0))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_many_elements(room, interleaved):
    B, H, T, D = 2, 33, 2**18, 128
    q, k = large(B, T, H + 1, D).transpose(1, 2).split((H, 1), dim=1)
    assert q.numel() > BEYOND
    angle = torch.randn(B, T, D // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    turned = rotary(q, k, cos, sin, interleaved=interleaved, impl="triton")
    back = rotary(*turned, cos, -sin, interleaved=interleaved, impl="triton")
    for x, y, z in zip((q, k), turned, back, strict=True):
        part = x[-1:, -1:, -9:]
        expected, _ = rotary(
            part, part, cos[-1:, -9:], sin[-1:, -9:], interleaved=interleaved, impl="reference"
        )
        near(y[-1:, -1:, -9:], expected)
        near(z[-1, -1], x[-1, -1])
    (grad,) = torch.autograd.grad(turned[0], q, turned[0].detach())
    near(grad[-1, -1], q[-1, -1])  # turned there and back


def test_attention_of_many_elements(room):
    B, H, T, D = 2**16 + 3, 8, 65, 64
    fused = large(B, T, 3, H, D)
    q, k, v = (x.transpose(1, 2) for x in fused.unbind(2))
    assert q.numel() > BEYOND
    out, _, lse = attention(q, k, v, window=40, impl="triton")
    grads = torch.autograd.grad(out, (q, k, v), out.detach())
    few = [last(x) for x in (q, k, v)]
    expected, _, lse_expected = attention(*few, window=40, impl="reference")
    near(out[-3:], expected)
    near(lse[-3:], lse_expected)
    for found, right in zip(
        grads, torch.autograd.grad(expected, few, expected.detach()), strict=True
    ):
        near(found[-3:], right)


def test_attention_decode_in_a_large_cache(room):
    B, K, D, T = 2, 8, 128, 2
    M = BEYOND // (B * K * D) + 65
    cache = StaticCache(1, B, K, M, D, device="cuda", dtype=BF16)
    keys, values = cache[0]
    assert keys.numel() > BEYOND
    keys.normal_()
    values.normal_()
    cache.advance(torch.tensor([5, M - T], device="cuda"))
    new = [large(B, n, T, D).detach() for n in (2 * K, K, K)]
    end = [x[-1:, -1:].clone() for x in (keys, values)]
    out = attention_decode(*new, cache[0], cache.lengths, scale=0.5, impl="triton")
    few = [new[0][-1:, -2:], new[1][-1:, -1:], new[2][-1:, -1:]]
    expected = attention_decode(*few, tuple(end), cache.lengths[-1:], scale=0.5, impl="reference")
    near(out[-1:, -2:], expected)
    for x, part, fresh in zip((keys, values), end, new[1:], strict=True):
        assert x[-1:, -1:].equal(part)
        assert x[-1, :, M - T :].equal(fresh[-1])
        assert x[0, :, 5 : 5 + T].equal(fresh[0])


@pytest.mark.parametrize(("C", "F"), [(16, 16384), (16384, 16)], ids=["wide result", "wide input"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_ffn_of_many_elements(room, C, F, activation):
    M = BEYOND // 16384 + 37
    x, weight, bias = large(M, C), large(F, C), large(F)
    gate = {"gate_weight": large(F, C)} if activation == "swiglu" else {}
    options = {"activation": activation, **gate}
    out = ffn(x, weight, bias, **options, impl="triton")
    few = last(x)
    expected = ffn(few, weight, bias, **options, impl="reference")
    near(out[-3:], expected)
    grad = torch.ones_like(out)
    (dx,) = torch.autograd.grad(out, x, grad)
    near(dx[-3:], torch.autograd.grad(expected, few, grad[-3:])[0])


@pytest.mark.parametrize(
    ("N", "C", "V"),
    [(2**17 + 37, 16384, 64), (4096, 16, 2**20 + 77), (130, 16384, 2**17 + 37)],
    ids=["hidden", "logits", "head"],
)
def test_cross_entropy_of_many_elements(room, N, C, V):
    hidden, head_weight = large(N, C), large(V, C)
    with torch.no_grad():
        head_weight.mul_(C**-0.5)
    targets = torch.arange(N, device="cuda") * 7919 % V
    targets[-1] = V - 1
    loss = cross_entropy(hidden, head_weight, targets, reduction="sum", impl="triton")
    dhidden, dhead = torch.autograd.grad(loss, (hidden, head_weight))
    few, weight = last(hidden), head_weight.detach()
    losses = cross_entropy(few, weight, targets[-3:], reduction="none", impl="reference")
    near(dhidden[-3:], torch.autograd.grad(losses.sum(), few)[0])
    x = hidden.detach()
    found = cross_entropy(x, weight, targets, reduction="none", impl="triton")
    near(found[-3:], losses)
    near(found.sum(), loss)
    if N * C < BEYOND:  # the last row of dW, from the losses: lse = loss + the target's logit
        lse = found + (x.float() * weight[targets].float()).sum(-1)
        share = (x.float() @ weight[-1].float() - lse).exp() - (targets == V - 1).float()
        near(dhead[-1], share @ x.float())
