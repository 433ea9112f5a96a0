"""The Triton rotary against the reference: both pairings, part of the channels, any strides."""

import pytest
import torch

from gptopt.kernels import KernelUnavailable, rotary

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def heads(device, B, H, T, D):
    return torch.randn(B, H, T, D, dtype=torch.float64).to(device)


def tables(device, B, T, R):
    angle = torch.randn(B, T, R, device=device)
    return angle.cos(), angle.sin()


def both(cos, sin, interleaved=False):
    def function(impl):
        return lambda q, k: rotary(q, k, cos, sin, interleaved=interleaved, impl=impl)

    return function("triton"), function("reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "D", "R"),
    [(2, 1, 1, 1, 2, 1), (1, 4, 2, 3, 16, 8), (2, 3, 3, 63, 40, 20), (1, 2, 1, 129, 17, 6)],
)
def test_both_pairings_whole_or_partial(device, check, dtype, interleaved, B, H, K, T, D, R):
    triton, reference = both(*tables(device, 1, T, R), interleaved)
    check(triton, reference, [heads(device, B, H, T, D), heads(device, B, K, T, D)], dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_row_may_have_its_own_angles(device, check, interleaved):
    triton, reference = both(*tables(device, 3, 5, 4), interleaved)
    check(triton, reference, [heads(device, 3, 2, 5, 10), heads(device, 3, 1, 5, 10)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_fused_projection(device, check, dtype):
    B, H, K, T, D = 2, 4, 2, 7, 16
    fused = torch.randn(B, T, (H + 2 * K) * D, dtype=torch.float64).to(device)
    q, k, _ = fused.split((H * D, K * D, K * D), dim=-1)
    q, k = (x.unflatten(-1, (-1, D)).transpose(1, 2) for x in (q, k))
    assert not q.is_contiguous()
    check(*both(*tables(device, 1, T, D // 2)), [q, k], dtype)
    check(*both(*tables(device, 1, T, 3)), [q.mT.contiguous().mT, k[..., ::1]], dtype)


def test_tables_of_any_strides(device, check):
    cos, sin = tables(device, 2, 10, 6)
    inputs = [heads(device, 2, 2, 5, 8), heads(device, 2, 2, 5, 8)]
    check(*both(cos[:, ::2, :3], sin.mT.contiguous().mT[:, 5:, ::2]), inputs)
    check(*both(cos[:1, :5].expand(2, 5, 6)[..., :4], sin[:1, :5].expand(2, 5, 6)[..., :4]), inputs)


def test_float64_by_gradcheck(device):
    cos, sin = (x.double() for x in tables(device, 1, 3, 2))
    q, k = (heads(device, 1, n, 3, 5).requires_grad_() for n in (2, 1))
    triton, reference = both(cos, sin)
    torch.testing.assert_close(triton(q, k), reference(q, k))
    assert torch.autograd.gradcheck(triton, (q, k))


def test_one_result_alone_and_an_expanded_gradient(device):
    cos, sin = tables(device, 1, 3, 4)
    q, k = (heads(device, 1, 2, 3, 8).float().requires_grad_() for _ in range(2))
    found = []
    for impl in ("triton", "reference"):
        out, _ = rotary(q, k, cos, sin, impl=impl)
        found.append(torch.autograd.grad(out.sum(), (q, k), materialize_grads=True))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("B", "H", "K", "T", "R"), [(0, 2, 1, 3, 2), (1, 2, 1, 0, 2), (2, 2, 1, 3, 0)]
)
def test_empty_inputs_and_no_rotation(device, B, H, K, T, R):
    q, k = (heads(device, B, n, T, 4).float() for n in (H, K))
    q.requires_grad_()
    found, expected = (f(q, k) for f in both(*tables(device, 1, T, R)))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    (gradient,) = torch.autograd.grad(found[0].sum(), q)
    assert gradient.shape == q.shape


def test_compile_keeps_one_node_and_the_results(device):
    cos, sin = tables(device, 1, 3, 4)
    q, k = (heads(device, 2, n, 3, 8).float().requires_grad_() for n in (2, 1))

    def function(q, k):
        a, b = rotary(q, k, cos, sin, impl="triton")
        return (a * 2).sum() + b.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(q, k), (q, k)),
        torch.autograd.grad(function(q, k), (q, k)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_what_no_kernel_does_is_refused_with_the_reason(device):
    q = torch.randn(1, 1, 1, 1026, device=device)
    cos, sin = tables(device, 1, 1, 4)
    with pytest.raises(KernelUnavailable, match="head dim of 1026 is above"):
        rotary(q, q, cos, sin, impl="triton")
