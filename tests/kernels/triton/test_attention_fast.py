"""Attention's two backward forms: the fast one's gradients, who runs when, and what repeats."""

import pytest
import torch

from gptopt.kernels import attention
from gptopt.kernels.attention import triton_backward

B, H, K = 2, 4, 2
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(params=[False, True], ids=["fast", "repeatable"])
def repeatable(request, deterministic):
    with deterministic(request.param):
        yield request.param


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The kernels of a backward, by name, in the order of their launches."""
    names: list[str] = []
    launch = triton_backward.launch

    def record(kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_backward, "launch", record)
    return names


FAST = ["attention_bwd_delta_kernel", "attention_bwd_dkdv_kernel"]
REPEATABLE = [*FAST, "attention_bwd_dq_kernel"]


def heads(T, P=0, D=16, H=H, K=K):
    shapes = [(B, H, T, D), *((B, K, T, D),) * 2, *(((B, K, P, D),) * 2 if P else ())]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def both(device, S, mask=False, documents=False, dropout=0.0, alibi=False, **options):
    """(by the kernels, by the reference), as functions of q, k, v and the past."""
    if mask:
        hidden = torch.arange(S) < torch.tensor([[3], [20]])
        options["key_mask"] = ~hidden.to(device)
    if documents:
        ids = torch.stack([torch.arange(S) // 13, torch.arange(S) // 5 % 3])
        options["doc_ids"] = ids.to(device)
    if dropout:
        options |= {"dropout_p": dropout, "seed": torch.tensor(2**40 + 17, device=device)}
    if alibi:
        options["alibi_slopes"] = torch.tensor([0.5, 0.25, 1.0, 0.125], device=device)

    def function(impl):
        def call(q, k, v, *past):
            result = attention(q, k, v, past=past or None, impl=impl, **options)
            return result.out, result.lse

        return call

    return function("triton"), function("reference")


CASES = {
    "causal": ({}, FP32),
    "full": ({"causal": False}, BF16),
    "window": ({"window": 7}, FP16),
    "softcap, scale": ({"softcap": 0.8, "scale": -0.4}, FP32),
    "padding, alibi": ({"mask": True, "alibi": True}, FP16),
    "documents, full": ({"documents": True, "causal": False}, BF16),
    "dropout": ({"dropout": 0.3}, BF16),
    "all": (
        {
            "mask": True,
            "documents": True,
            "window": 19,
            "softcap": 2.0,
            "alibi": True,
            "dropout": 0.2,
        },
        FP32,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_option_without_a_pass_for_the_queries(device, check, launched, name):
    options, dtype = CASES[name]
    tensors = [x.to(device) for x in heads(33, P=2)]
    check(*both(device, 35, **options), tensors, dtype)
    assert launched == FAST


@pytest.mark.parametrize(
    ("T", "P", "causal", "dtype"),
    [(1, 0, True, BF16), (3, 60, False, FP16), (63, 0, True, FP32), (33, 32, True, FP32)],
)
def test_lengths(device, check, launched, T, P, causal, dtype):
    tensors = [x.to(device) for x in heads(T, P, H=2, K=1)]
    check(*both(device, T + P, causal=causal), tensors, dtype)
    assert launched == FAST


@pytest.mark.parametrize(("D", "K", "dtype"), [(1, 4, FP32), (40, 1, FP32), (72, 2, BF16)])
def test_head_sizes_and_groups(device, check, D, K, dtype):
    check(*both(device, 34), [x.to(device) for x in heads(34, D=D, K=K)], dtype)


def test_views_of_a_fused_projection(device, check):
    fused = torch.randn(B, 40, 3, H, 16, dtype=torch.float64, device=device)
    check(*both(device, 40), [x.transpose(1, 2) for x in fused.unbind(2)], BF16)


def test_rows_that_see_no_key_learn_nothing(device):
    q, k, v = (x.to(device, FP16).requires_grad_() for x in heads(40))
    mask = torch.arange(40, device=device).expand(B, 40) >= 35
    out = attention(q, k, v, key_mask=mask, impl="triton").out
    dq, dk, dv = torch.autograd.grad(out.sin().sum(), (q, k, v))
    assert (dq[:, :, :35] == 0).all()
    assert (dk[:, :, :35] == 0).all()
    assert all(x.isfinite().all() and x.dtype == FP16 for x in (dq, dk, dv))


def gradients(device, tensors):
    leaves = [x.to(device, FP16).requires_grad_() for x in tensors]
    out = attention(*leaves, impl="triton").out
    return torch.autograd.grad(out.sin().sum(), leaves)


def test_torchs_flag_chooses_the_form(device, launched, repeatable):
    gradients(device, heads(5))
    assert launched == (REPEATABLE if repeatable else FAST)


def test_the_repeatable_form_gives_the_same_bits(device, deterministic):
    tensors = heads(40, H=2, K=1)
    with deterministic(True):
        first, second = gradients(device, tensors), gradients(device, tensors)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    fast = gradients(device, tensors)
    for a, b in zip(first, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.001)


def test_a_compiled_function_follows_the_flag(device, launched, deterministic):
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, impl="triton").out, fullgraph=True, backend="aot_eager"
    )
    leaves = [x.to(device, FP32).requires_grad_() for x in heads(5)]
    for wanted, names in ((False, FAST), (True, REPEATABLE), (False, FAST)):
        launched.clear()
        with deterministic(wanted):
            torch.autograd.grad(compiled(*leaves).sum(), leaves)
        assert launched == names


@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (2, 2, 0, 16)])
def test_nothing_to_do(device, repeatable, shape):
    leaves = [torch.zeros(shape, dtype=BF16, device=device, requires_grad=True) for _ in range(3)]
    found = torch.autograd.grad(attention(*leaves, impl="triton").out.sum(), leaves)
    assert [(x.shape, x.dtype) for x in found] == [(shape, BF16)] * 3
