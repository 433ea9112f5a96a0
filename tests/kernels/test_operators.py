"""The registered operators: torch's own checks, their FLOPs, autograd and what may not alias."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import gptopt.kernels  # noqa: F401 - registers the operators

OPS = torch.ops.gptopt
B, H, K, T, P, D = 2, 4, 2, 3, 2, 8
S, C, F, V = P + T, 6, 10, 12
SEED = torch.tensor(2**40 + 3)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def plain(arguments: tuple) -> tuple:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)


def attention_calls() -> dict[str, list[tuple]]:
    q, k, v, past_k, past_v = (
        leaf(B, n, t, D) for n, t in ((H, T), *((K, T),) * 2, *((K, P),) * 2)
    )
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, :3] = False
    documents = torch.tensor([[0, 0, 1, 1, 1]] * B)
    masks = (mask, documents, torch.rand(H), SEED)
    options = (True, 2, 5.0, 0.3, 0.3)
    bare = (None,) * 4
    calls = [
        (q, k, v, None, None, *bare, True, None, None, 0.3, 0.0),
        (q, k, v, past_k, past_v, *masks, *options),
    ]
    keys, values = (torch.randn(B, K, S, D) for _ in range(2))
    out, lse = torch.randn(B, H, T, D), torch.randn(B, H, T)
    state = (*plain((q,)), keys, values, out, lse)
    cache = (torch.zeros(B, K, 7, D), torch.zeros(B, K, 7, D), torch.tensor([2, 4]))
    return {
        "attention": calls,
        "attention_backward": [
            (torch.randn_like(out), torch.randn_like(lse), *state, *masks, *options),
            (torch.randn_like(out), None, *state, *bare, False, None, None, 0.3, 0.0),
        ],
        "attention_decode": [(*plain((q, k, v)), *cache, torch.rand(H), 3, None, 0.3)],
    }


def layernorm_calls() -> dict[str, list[tuple]]:
    x, weight, bias, residual = leaf(B, T, C), leaf(C), leaf(C), leaf(B, T, C)
    grad = torch.randn(B, T, C)
    h, w, b = plain((x, weight, bias))
    return {
        "layernorm": [
            (x, weight, bias, None, None, "layer", 1e-5, 0.0),
            (x, weight, None, residual, None, "rms", 1e-5, 0.0),
            (x, None, None, residual, SEED, "layer", 1e-5, 0.5),
            (x, weight, bias, None, SEED, "rms", 1e-5, 0.5),
        ],
        "layernorm_backward": [
            (grad, grad * 2, h, w, b, None, "layer", 1e-5, 0.0, [True] * 3),
            (grad, None, h, w, None, SEED, "rms", 1e-5, 0.5, [True, False, True]),
            (None, grad, h, w, b, None, "layer", 1e-5, 0.0, [True] * 3),
            (grad, None, h, w, b, None, "layer", 1e-5, 0.0, [False] * 3),
        ],
    }


def ffn_calls() -> dict[str, list[tuple]]:
    x, weight, bias, addend = leaf(B, T, C), leaf(F, C), leaf(F), leaf(B, T, F)
    calls = [
        (x, weight, bias, None, None, None, "relu2"),
        (x, weight, None, leaf(F, C), leaf(F), addend, "swiglu"),
    ]
    grad, hidden = torch.randn(B, T, F), torch.randn(B, T, F)
    return {
        "ffn": calls,
        "ffn_forward": [plain(call) for call in calls],
        "ffn_backward": [
            (grad, *plain(calls[1][:6]), None, None, "swiglu", [True] * 6),
            (grad, *plain(calls[0][:6]), hidden, torch.zeros(0), "relu2", [True, False] * 3),
        ],
    }


def cross_entropy_calls() -> dict[str, list[tuple]]:
    hidden, head_weight, targets = leaf(B, T, C), leaf(V, C), torch.randint(0, V, (B, T))
    targets[0, 0] = -100
    options = {r: (-100, 0.1, 1e-3, 5.0, r) for r in ("mean", "sum", "none")}
    calls = {r: (hidden, head_weight, targets, *options[r]) for r in options}
    inputs = plain((hidden, head_weight, targets))
    found = (torch.randn(B, T, C), torch.randn(V, C))
    return {
        "cross_entropy": list(calls.values()),
        "cross_entropy_forward": [(*plain(calls[r]), [True, r == "sum"]) for r in ("mean", "sum")],
        "cross_entropy_backward": [
            (torch.tensor(2.0), *inputs, *found, *options["mean"], [True, True]),
            (torch.randn(B, T), *inputs, None, None, *options["none"], [True, False]),
        ],
    }


def rotary_calls() -> dict[str, list[tuple]]:
    q, k, table = leaf(B, H, T, D), leaf(B, K, T, D), torch.randn(1, T, 3)
    return {
        "rotary": [(q, k, table, table, False), (q, k, table, table, True)],
        "rotary_backward": [plain((q, k, table, table, False))],
    }


def every_call() -> list:
    torch.manual_seed(0)
    groups = (attention_calls, layernorm_calls, ffn_calls, cross_entropy_calls, rotary_calls)
    calls = {name: cases for group in groups for name, cases in group().items()}
    return [
        pytest.param(name, case, id=f"{name}-{i}")
        for name, cases in calls.items()
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("name", "arguments"), every_call())
def test_opcheck(name, arguments):
    opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize(("name", "arguments"), every_call())
def test_results_share_no_memory_with_arguments_or_each_other(name, arguments):
    if name == "attention_decode":
        arguments = plain(arguments)
    results = getattr(OPS, name)(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    seen = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
    for result in results:
        if result.numel():
            pointer = result.untyped_storage().data_ptr()
            assert pointer not in seen
            assert result.is_contiguous()
            seen.add(pointer)


def test_a_gradient_of_a_gradient_is_refused_not_wrong():
    x = torch.randn(2, 4, requires_grad=True)
    y, _ = OPS.layernorm(x, None, None, None, None, "layer", 1e-5, 0.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_works_where_autograd_is_switched_off_around_it():
    (name, arguments), *_ = [c.values for c in every_call() if c.values[0] == "ffn_backward"]
    expected = getattr(OPS, name)(*arguments)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        found = getattr(OPS, name)(*arguments)
    assert all(a.equal(b) for a, b in zip(expected, found, strict=True))


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_are_those_of_the_matrix_products():
    def attention():
        q, k = leaf(B, H, T, D), leaf(B, K, T, D)
        out, *_ = OPS.attention(q, k, k, None, None, *(None,) * 4, True, None, None, 0.3, 0.0)
        out.sum().backward()

    product = 2 * B * H * T * T * D
    assert counted(attention) == (2 + 5) * product

    x, weight = leaf(B, T, C), leaf(F, C)
    product = 2 * B * T * C * F

    def ffn(gate, *wanted):
        out = OPS.ffn(x, weight, None, gate, None, None, "swiglu" if gate is not None else "relu")
        torch.autograd.grad(out.sum(), wanted)

    assert counted(lambda: ffn(None, x, weight)) == 3 * product
    assert counted(lambda: ffn(weight.detach(), x)) > 4 * product
    with torch.no_grad():
        assert counted(lambda: OPS.ffn(x, weight, None, weight, None, None, "geglu")) == 2 * product

    def loss(reduction):
        targets = torch.zeros(B, T, dtype=torch.int64)
        loss = OPS.cross_entropy(x, weight, targets, -100, 0.0, 0.0, None, reduction)
        loss.sum().backward()

    assert counted(lambda: loss("mean")) == 3 * product
    assert counted(lambda: loss("none")) == (1 + 3) * product  # the logits are computed again


def test_flops_of_a_past_and_of_a_cache():
    q, k, past, cache = (torch.randn(B, n, t, D) for n, t in ((H, T), (K, T), (K, P), (K, 9)))
    bare = (None,) * 4

    def attention():
        OPS.attention(q, k, k, past, past, *bare, True, None, None, 0.3, 0.0)

    def decode():
        lengths = torch.zeros(B, dtype=torch.int64)
        OPS.attention_decode(q, k, k, cache, cache.clone(), lengths, None, None, None, 0.3)

    assert counted(attention) == 2 * 2 * B * H * T * S * D
    assert counted(decode) == 2 * 2 * B * H * T * 9 * D
