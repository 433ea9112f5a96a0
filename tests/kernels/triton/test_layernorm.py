"""The Triton layernorm against the reference body: results, gradients, masks, strides, edges."""

import itertools

import pytest
import torch

from gptopt.kernels import KernelUnavailable, dropout, layernorm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 2**40 + 3


def inputs(device, rows, C, *, residual=True):
    """x, weight, bias and residual in float64, the means away from 0."""
    shapes = [(rows, C), (C,), (C,), *([(rows, C)] if residual else [])]
    return [(torch.randn(s, dtype=torch.float64) + 0.5).to(device) for s in shapes]


def both(seed=None, **options):
    """The operator by its Triton body and by its reference body, as functions of its tensors."""

    def function(impl):
        def call(x, weight=None, bias=None, residual=None):
            p = 0.0 if seed is None else 0.3
            return layernorm(
                x, weight, bias, residual, **options, dropout_p=p, seed=seed, impl=impl
            )

        return call

    return function("triton"), function("reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("rows", "C"), [(1, 1), (3, 16), (63, 40), (129, 24)])
def test_norm_with_dropout_and_residual(device, check, dtype, kind, rows, C):
    triton, reference = both(torch.tensor(SEED, device=device), kind=kind)
    check(triton, reference, inputs(device, rows, C), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [768, 1000, 1600])
def test_the_widths_of_real_models(device, check, dtype, C):
    check(*both(), inputs(device, 5, C), dtype)


@pytest.mark.parametrize(("kind", "C"), [("layer", 8192), ("rms", 9001), ("layer", 16384)])
def test_wide_rows(device, check, kind, C):
    check(*both(kind=kind), inputs(device, 5, C), torch.float32)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(
    ("weighted", "biased", "summed", "dropped"), list(itertools.product([False, True], repeat=4))
)
def test_every_argument_may_be_absent(device, check, kind, weighted, biased, summed, dropped):
    x, *rest = inputs(device, 7, 24)
    given = (weighted, biased, summed)
    seed = torch.tensor(SEED, device=device) if dropped else None
    triton, reference = both(seed, kind=kind, eps=1e-3)

    def spread(function):
        def call(x, *tensors):
            found = iter(tensors)
            return function(x, *(next(found) if there else None for there in given))

        return call

    present = [tensor for tensor, there in zip(rest, given, strict=True) if there]
    check(spread(triton), spread(reference), [x, *present])


def test_either_result_alone_has_the_right_gradients(device, check):
    triton, reference = both(torch.tensor(SEED, device=device))
    for index in (0, 1):
        check(
            lambda *tensors: (triton(*tensors)[index],),  # noqa: B023 - called in this turn
            lambda *tensors: (reference(*tensors)[index],),  # noqa: B023 - called in this turn
            inputs(device, 6, 20),
        )


def test_a_mean_far_from_zero_costs_no_digits(device, check):
    x, weight, bias, residual = inputs(device, 4, 64)
    check(*both(), [x + 300.0, weight, bias, residual])


def test_float64_by_gradcheck(device):
    tensors = [x.requires_grad_() for x in inputs(device, 2, 3)]
    for kind in ("layer", "rms"):
        triton, reference = both(kind=kind)
        torch.testing.assert_close(triton(*tensors), reference(*tensors))
        assert torch.autograd.gradcheck(triton, tensors)


def test_the_mask_is_that_of_the_dropout_function(device):
    seed = torch.tensor(-SEED, device=device)
    x = torch.rand(9, 70, device=device) + 1
    _, h = layernorm(x, None, None, dropout_p=0.4, seed=seed, impl="triton")
    assert torch.equal(h, dropout(x, 0.4, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(device, check, dtype):
    x, weight, bias, residual = inputs(device, 6, 24)
    fused = torch.stack((x, x.flip(0)), dim=1)  # rows with a gap
    check(*both(), [fused[:, 1], weight, bias, residual], dtype)
    check(*both(), [x, weight, bias, residual.t().contiguous().t()], dtype)
    check(*both(), [x.view(2, 3, 24).transpose(0, 1), weight, bias, residual.view(3, 2, 24)], dtype)
    wide_weight = torch.stack((weight, bias), dim=1)
    check(*both(), [x[:, ::2], wide_weight[::2, 0], bias[::2], residual[:, ::2]], dtype)


def test_an_expanded_gradient(device):
    x = torch.randn(4, 8, device=device, requires_grad=True)
    results = []
    for impl in ("triton", "reference"):
        y, h = layernorm(x, None, None, x * 2, impl=impl)
        (found,) = torch.autograd.grad(y.square().sum() + h.sum(), x)
        results.append(found)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty_inputs(device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[-1], device=device, requires_grad=True)
    y, h = layernorm(x, weight, weight, x, impl="triton")
    assert y.shape == h.shape == shape
    dx, dweight = torch.autograd.grad((y + h).sum(), (x, weight))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_mixed_dtypes_follow_the_reference(device, check):
    """A float32 residual stream and float32 parameters beside a bfloat16 branch."""
    x, weight, bias, residual = inputs(device, 5, 48)

    def function(impl):
        def call(x):
            branch = x.bfloat16()
            return layernorm(branch, weight.float(), bias.float(), residual.float(), impl=impl)

        return call

    for result in function("triton")(x.float()):
        assert result.dtype == torch.float32
    check(function("triton"), function("reference"), [x], torch.bfloat16)
    leaf = weight.float().requires_grad_()
    y, _ = layernorm(x.bfloat16(), leaf, None, impl="triton")
    (gradient,) = torch.autograd.grad(y.float().sum(), leaf)
    assert (y.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)


def test_only_what_is_asked_for_is_computed(device):
    x, weight, bias, _ = (t.float() for t in inputs(device, 4, 12))
    grad = torch.randn_like(x)
    backward = torch.ops.gptopt.layernorm_backward.default
    full = backward(grad, None, x, weight, bias, None, "layer", 1e-5, 0.0, [True] * 3)
    for mask in itertools.product([False, True], repeat=3):
        found = backward(grad, None, x, weight, bias, None, "layer", 1e-5, 0.0, mask)
        for wanted, part, whole in zip(mask, found[1:], full[1:], strict=True):
            assert torch.equal(part, whole) if wanted else part.numel() == 0


def test_the_backward_repeats_to_the_bit(device):
    x, weight, bias, _ = (t.float() for t in inputs(device, 50, 96))
    grad = torch.randn_like(x)
    arguments = (grad, grad, x, weight, bias, None, "layer", 1e-5, 0.0, [True] * 3)
    first, second = (torch.ops.gptopt.layernorm_backward.default(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_leaves_the_statistics_alone(device):
    x = torch.randn(3, 32, device=device)
    weight = torch.randn(32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found, _ = layernorm(x, weight, None, impl="triton")
        expected, _ = layernorm(x, weight, None, impl="reference")
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_compile_keeps_one_node_and_the_results(device):
    nodes = []

    def backend(graph, example):
        from torch._dynamo.backends.debugging import aot_eager

        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return aot_eager(graph, example)

    def function(x, weight, residual):
        y, h = layernorm(x, weight, None, residual, kind="rms", impl="triton")
        return (y * 2 + h).sum()

    x, weight, _, residual = (t.float().requires_grad_() for t in inputs(device, 4, 24))
    leaves = (x, weight, residual)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(function(*leaves), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert [node for node in nodes if "gptopt" in node] == ["gptopt.layernorm.default"]


def test_what_no_kernel_does_is_refused_with_the_reason_and_right_in_the_operator(device):
    x = torch.randn(2, 16385, device=device)
    with pytest.raises(KernelUnavailable, match="width of 16385 is above"):
        layernorm(x, None, None, impl="triton")
    y, _ = torch.ops.gptopt.layernorm.default(x, None, None, None, None, "layer", 1e-5, 0.0)
    torch.testing.assert_close(y, layernorm(x, None, None, impl="reference")[0])
