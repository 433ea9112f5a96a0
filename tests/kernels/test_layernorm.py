"""layernorm against its formula written out, with the sum and the dropout before it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptopt.kernels import layernorm

SEED = torch.tensor(77)
EPS = 1e-5


def by_formula(x, *rest, names=(), kind, p=0.0, kept=None, eps=EPS) -> tuple[Tensor, Tensor]:
    given = dict(zip(names, rest, strict=True))
    h = x if kept is None else x * kept / (1 - p)
    if "residual" in given:
        h = h + given["residual"]
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    if "weight" in given:
        y = y * given["weight"]
    if "bias" in given:
        y = y + given["bias"]
    return y.to(h.dtype), h


def by_operator(x, *rest, names=(), kind, p=0.0, eps=EPS) -> tuple[Tensor, Tensor]:
    given = {"weight": None, "bias": None, **dict(zip(names, rest, strict=True))}
    seed = SEED if p else None
    return layernorm(x, **given, kind=kind, eps=eps, dropout_p=p, seed=seed)


def inputs(names, shape) -> list[Tensor]:
    shapes = {"weight": shape[-1:], "bias": shape[-1:], "residual": shape}
    return [torch.randn(s, dtype=torch.float64) for s in (shape, *(shapes[n] for n in names))]


NAMES = [(), ("weight",), ("weight", "bias"), ("bias", "residual"), ("weight", "bias", "residual")]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("shape", [(2, 3, 63), (1, 1000), (5,)])
def test_results_and_gradients_follow_the_formula(kind, names, shape, path, check):
    options = {"names": names, "kind": kind}
    check(partial(by_operator, **options), partial(by_formula, **options), inputs(names, shape))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_within_its_budget(kind, dtype, path, check):
    names = ("weight", "bias", "residual")
    options = {"names": names, "kind": kind}
    check(
        partial(by_operator, **options),
        partial(by_formula, **options),
        inputs(names, (4, 80)),
        dtype,
    )


@pytest.mark.parametrize("names", [("weight",), ("weight", "bias", "residual")])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_dropout_comes_before_the_sum(kind, names, path, check, keeps):
    shape, p = (3, 4, 6), 0.4
    kept = torch.tensor([keeps(int(SEED), p, i) for i in range(72)]).view(shape)
    options = {"names": names, "kind": kind, "p": p}
    oracle = partial(by_formula, **options, kept=kept)
    check(partial(by_operator, **options), oracle, inputs(names, shape))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("names", [(), ("weight", "bias", "residual")])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gradcheck(kind, names, p, path):
    function = partial(by_operator, names=names, kind=kind, p=p)
    leaves = [x.requires_grad_() for x in inputs(names, (2, 5))]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_second_derivatives_exist_on_the_plain_path():
    leaves = [x.requires_grad_() for x in inputs(("weight", "bias"), (2, 5))]
    function = partial(by_operator, names=("weight", "bias"), kind="layer")
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_without_sum_and_dropout_the_residual_is_x_itself(path):
    x = torch.randn(2, 8, requires_grad=True)
    _, h = layernorm(x, None, None)
    assert h is x
    (layernorm(x, None, None)[0].sum() + h.sum()).backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_only_the_gradients_asked_for_are_made(path):
    x, weight, bias, residual = (x.float() for x in inputs(NAMES[-1], (2, 8)))
    residual.requires_grad_()
    y, _ = layernorm(x, weight, bias, residual)
    y.square().sum().backward()
    assert residual.grad is not None
    assert x.grad is None
    assert weight.grad is None
    again = residual.detach().clone().requires_grad_()
    (x + again).requires_grad_()
    F.layer_norm(x + again, (8,), weight, bias).square().sum().backward()
    torch.testing.assert_close(residual.grad, again.grad)


def test_large_mean_does_not_destroy_the_variance(path):
    x = torch.randn(4, 256) + 1000
    exact = F.layer_norm(x.double(), (256,))
    torch.testing.assert_close(layernorm(x, None, None)[0].double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_float32_weights_beside_lower_precision(kind, path):
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    weight = torch.randn(16, requires_grad=True)
    y, _ = layernorm(x, weight, None, kind=kind)
    assert y.dtype == torch.bfloat16
    expected, _ = by_formula(x.double(), weight.double(), names=("weight",), kind=kind)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_sum_has_the_wider_dtype(p, path):
    x = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(3, 16, requires_grad=True)
    y, h = layernorm(x, None, None, residual, dropout_p=p, seed=SEED if p else None)
    assert y.dtype == h.dtype == torch.float32
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert residual.grad is not None
    assert residual.grad.dtype == torch.float32


def test_autocast_keeps_the_dtype_of_the_stream(path):
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, 16, dtype=dtype)
            y, h = layernorm(x, torch.ones(16), torch.zeros(16))
            assert y.dtype == h.dtype == dtype


def test_strided_inputs_give_the_same_numbers(path, check):
    names = ("weight", "bias", "residual")
    x, weight, bias, residual = inputs(names, (6, 5))

    def function(x, weight, bias, residual, strided):
        if strided:
            x, residual = x.T.contiguous().T, residual.T.contiguous().T
            weight = torch.stack((weight, weight), 1)[:, 0]
        return layernorm(x, weight, bias, residual)

    tensors = [x, weight, bias, residual]
    check(partial(function, strided=True), partial(function, strided=False), tensors)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_sizes_of_zero(shape, kind, path):
    tensors = [x.requires_grad_() for x in inputs(("weight", "residual"), shape)]
    y, h = by_operator(*tensors, names=("weight", "residual"), kind=kind)
    assert y.shape == h.shape == shape
    y.sum().backward()
    assert tensors[1].grad is not None
    assert (tensors[1].grad == 0).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    C=st.sampled_from([1, 2, 7, 64, 129]),
    kind=st.sampled_from(["layer", "rms"]),
    names=st.sampled_from(NAMES),
)
def test_operator_and_plain_path_agree_on_any_shape(shape, C, kind, names):
    generator = torch.Generator().manual_seed(C)
    shapes = {"weight": (C,), "bias": (C,), "residual": (*shape, C)}
    x = torch.randn(*shape, C, generator=generator)
    rest = [torch.randn(shapes[n], generator=generator) for n in names]
    y, h = by_operator(x, *rest, names=names, kind=kind)
    given = {**dict.fromkeys(shapes), **dict(zip(names, rest, strict=True))}
    arguments = (x, given["weight"], given["bias"], given["residual"])
    op_y, op_h = torch.ops.gptopt.layernorm(*arguments, None, kind, EPS, 0.0)
    assert op_y.equal(y)
    assert op_h.equal(h) if "residual" in names else op_h.numel() == 0


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X.int()}, "x is of dtype torch.int32"),
        ({"x": torch.tensor(1.0)}, r"x is of shape \(\), expected \(\.\.\., C\)"),
        ({"weight": torch.zeros(7)}, r"weight is of shape \(7,\), expected \(C,\) = \(8,\)"),
        ({"bias": torch.zeros(2, 8)}, r"bias is of shape \(2, 8\)"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, "bias is of dtype torch.int64"),
        ({"weight": torch.zeros(8, device="meta")}, "weight is on meta, expected cpu as x"),
        ({"residual": torch.zeros(1, 8)}, r"residual is of shape \(1, 8\), .* = \(2, 8\)"),
        ({"residual": X.to("meta")}, "residual is on meta"),
        ({"kind": "group"}, "kind is 'group', expected 'layer' or 'rms'"),
        ({"eps": 0.0}, r"eps is 0\.0, expected a number above 0"),
        ({"dropout_p": -0.1}, r"dropout_p is -0\.1"),
        ({"dropout_p": 0.1}, "seed is None"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        layernorm(**{"x": X, "weight": None, "bias": None, **changed})
