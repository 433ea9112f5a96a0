"""ffn against its formula written out, activation by activation."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from gptopt.kernels import ffn

ACTIVATIONS = {
    "relu": lambda z: z * (z > 0),
    "relu2": lambda z: (z * (z > 0)) ** 2,
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "swiglu": lambda z: z * torch.sigmoid(z),
    "geglu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
}
GATED = ("swiglu", "geglu")
NAMES = [
    ("weight",),
    ("weight", "bias"),
    ("weight", "bias", "addend"),
    ("weight", "gate_weight"),
    ("weight", "bias", "gate_weight", "gate_bias", "addend"),
]
CASES = [(a, n) for a in ACTIVATIONS for n in NAMES if (a in GATED) == ("gate_weight" in n)]


def by_formula(x, *rest, names, activation) -> tuple[Tensor]:
    given = dict(zip(names, rest, strict=True))
    z = x @ given["weight"].mT + given.get("bias", 0.0) + given.get("addend", 0.0)
    out = ACTIVATIONS[activation](z)
    if activation in GATED:
        out = out * (x @ given["gate_weight"].mT + given.get("gate_bias", 0.0))
    return (out,)


def by_operator(x, *rest, names, activation) -> tuple[Tensor]:
    given = {"bias": None, **dict(zip(names, rest, strict=True))}
    return (ffn(x, given.pop("weight"), given.pop("bias"), activation=activation, **given),)


def inputs(names, shape=(2, 3, 7), width=5) -> list[Tensor]:
    C = shape[-1]
    shapes = {"addend": (*shape[:-1], width), "bias": (width,), "gate_bias": (width,)}
    sizes = [shapes.get(name, (width, C)) for name in names]
    return [torch.randn(size, dtype=torch.float64) for size in (shape, *sizes)]


@pytest.mark.parametrize(("activation", "names"), CASES)
def test_results_and_gradients_follow_the_formula(activation, names, path, check):
    options = {"names": names, "activation": activation}
    check(partial(by_operator, **options), partial(by_formula, **options), inputs(names))


@pytest.mark.parametrize("shape", [(63,), (1, 1, 1), (129, 3)])
def test_odd_shapes(shape, path, check):
    options = {"names": NAMES[-1], "activation": "swiglu"}
    tensors = inputs(NAMES[-1], shape, width=33)
    check(partial(by_operator, **options), partial(by_formula, **options), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lower_precision_stays_within_its_budget(activation, dtype, path, check):
    names = NAMES[-1] if activation in GATED else NAMES[2]
    options = {"names": names, "activation": activation}
    tensors = inputs(names, (4, 40), 24)
    check(partial(by_operator, **options), partial(by_formula, **options), tensors, dtype)


@pytest.mark.parametrize(("activation", "names"), [c for c in CASES if len(c[1]) in (3, 5)])
def test_gradcheck(activation, names, path):
    function = partial(by_operator, names=names, activation=activation)
    leaves = [x.requires_grad_() for x in inputs(names)]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_only_the_gradients_asked_for_are_made(path):
    x, weight, bias, addend = (x.float() for x in inputs(NAMES[2]))
    addend.requires_grad_()  # a frozen layer with LoRA beside it
    ffn(x, weight, bias, activation="gelu", addend=addend).sum().backward()
    assert addend.grad is not None
    assert addend.grad.abs().sum() > 0
    assert weight.grad is None
    assert x.grad is None


def test_backward_without_what_was_kept_computes_it_again():
    x, weight, bias, gate_weight, gate_bias, addend = inputs(NAMES[-1])
    arguments = (x, weight, bias, gate_weight, gate_bias, addend, "swiglu")
    out, hidden, gate = torch.ops.gptopt.ffn_forward(*arguments)
    assert out.equal(torch.ops.gptopt.ffn(*arguments))
    torch.testing.assert_close(hidden, x @ weight.mT + bias + addend)
    torch.testing.assert_close(gate, x @ gate_weight.mT + gate_bias)
    grad = torch.randn_like(out)
    backward = torch.ops.gptopt.ffn_backward
    kept = backward(grad, *arguments[:-1], hidden, gate, "swiglu", [True] * 6)
    again = backward(grad, *arguments[:-1], None, None, "swiglu", [True] * 6)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b)
    masked = backward(grad, *arguments[:-1], hidden, gate, "swiglu", [False, True] * 3)
    assert [x.numel() > 0 for x in masked] == [False, True] * 3


def test_strided_inputs_give_the_same_numbers(path, check):
    def function(x, weight, bias, strided):
        if strided:
            x, weight = x.mT.contiguous().mT, weight.T.contiguous().T
        return (ffn(x, weight, bias, activation="gelu"),)

    tensors = inputs(("weight", "bias"))
    check(partial(function, strided=True), partial(function, strided=False), tensors)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_sizes_of_zero(shape, path):
    tensors = [x.requires_grad_() for x in inputs(NAMES[-1], shape)]
    (out,) = by_operator(*tensors, names=NAMES[-1], activation="geglu")
    assert out.shape == (*shape[:-1], 5)
    out.sum().backward()
    assert tensors[1].grad is not None
    assert (tensors[1].grad == 0).all()


def test_autocast_lowers_every_tensor(path):
    x, weight, bias = (x.float().requires_grad_() for x in inputs(("weight", "bias")))
    with torch.autocast("cpu", torch.bfloat16):
        out = ffn(x.bfloat16(), weight, bias, activation="gelu")
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


X, W = torch.zeros(2, 4), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X.long()}, "x is of dtype torch.int64"),
        ({"x": torch.tensor(0.0)}, r"x is of shape \(\)"),
        ({"weight": W.T}, r"weight is of shape \(4, 6\), expected \(F, C\) with C = 4"),
        ({"weight": W.double()}, "weight is of dtype torch.float64, expected torch.float32 as x"),
        ({"weight": W.to("meta")}, "weight is on meta"),
        ({"bias": torch.zeros(4)}, r"bias is of shape \(4,\), expected \(F,\) = \(6,\)"),
        ({"activation": "tanh"}, "activation is 'tanh', expected one of relu, relu2, gelu"),
        ({"activation": "swiglu"}, r"gate_weight is None, expected an \(F, C\) tensor"),
        ({"gate_weight": W}, "gate_weight is given, expected None for activation 'relu'"),
        ({"gate_bias": torch.zeros(6)}, "gate_bias is given, expected None"),
        ({"activation": "geglu", "gate_weight": W[:2]}, r"gate_weight is of shape \(2, 4\)"),
        (
            {"activation": "geglu", "gate_weight": W, "gate_bias": torch.zeros(1)},
            r"gate_bias is of shape \(1,\)",
        ),
        ({"addend": torch.zeros(6)}, r"addend is of shape \(6,\), .* = \(2, 6\)"),
        ({"addend": torch.zeros(2, 6).half()}, "addend is of dtype torch.float16"),
        ({"impl": None}, "impl is None"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {"x": X, "weight": W, "bias": None, "activation": "relu", **changed}
    with pytest.raises(ValueError, match=message):
        ffn(**arguments)
