"""ffn's backward with the derivative inside the product, beside its other form."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gptopt.kernels
from gptopt.kernels.ffn import reference, triton
from gptopt.kernels.ffn.reference import ACTIVATIONS, GATED

OPS = torch.ops.gptopt
ORDER = ("weight", "bias", "gate_weight", "gate_bias", "addend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """The fused form, whatever the table says; in the list one entry for each time it ran."""
    times: list[int] = []
    multiply = triton.multiply
    monkeypatch.setattr(triton, "is_fused", lambda *_: True)
    monkeypatch.setattr(triton, "multiply", lambda *a: (times.append(1), multiply(*a))[1])
    return times


def by_kernel(x, *rest, activation, body=None) -> tuple[Tensor]:
    given = rest if len(rest) == 5 else (*rest[:2], None, None, rest[2])
    return ((body or OPS.ffn)(x, *given, activation),)


by_reference = partial(by_kernel, body=reference.ffn)


def tensors(activation, device, M=9, C=40, F=24) -> list[Tensor]:
    gate = [(F, C), (F,)] if activation in GATED else []
    shapes = [(M, C), (F, C), (F,), *gate, (M, F)]
    return [torch.randn(size, dtype=torch.float64, device=device) for size in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_and_gradients_are_the_reference(activation, dtype, device, runs, check):
    functions = (partial(f, activation=activation) for f in (by_kernel, by_reference))
    check(*functions, tensors(activation, device), dtype)
    assert runs


@pytest.mark.parametrize(("M", "C", "F"), [(1, 1, 1), (3, 33, 50), (63, 64, 32), (129, 70, 33)])
@pytest.mark.parametrize("activation", ["relu2", "geglu"])
def test_odd_sizes(activation, M, C, F, device, runs, check):
    functions = (partial(f, activation=activation) for f in (by_kernel, by_reference))
    check(*functions, tensors(activation, device, M, C, F))
    assert runs


def test_strided_inputs(device, runs, check):
    x, weight, bias, _, gate_bias, addend = tensors("swiglu", device, 6, 7, 5)
    wide = torch.randn(6, 3, 7, dtype=torch.float64, device=device)
    padded = torch.randn(5, 9, dtype=torch.float64, device=device)
    variants = [
        (wide[:, 1], padded[:, 1:8], bias, weight.T.contiguous().T, gate_bias, addend),
        (x.T.contiguous().T, weight, padded[:, 3], padded[:, :7], gate_bias, wide[:, 2, :5]),
    ]
    functions = [partial(f, activation="swiglu") for f in (by_kernel, by_reference)]
    for inputs in variants:
        check(*functions, inputs)
    assert len(runs) == len(variants)


@pytest.mark.parametrize("expand", [True, False])
def test_a_grad_of_any_stride(expand, device, runs):
    leaves = [x.float().requires_grad_() for x in tensors("geglu", device, 6, 7, 5)]
    grad = torch.arange(6.0, device=device)[:, None].expand(6, 5)
    grad = grad if expand else torch.randn(5, 6, device=device).T
    found, expected = (
        torch.autograd.grad(f(*leaves, activation="geglu")[0], leaves, grad)
        for f in (by_kernel, by_reference)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert runs


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_what_is_not_asked_for_is_not_made_and_changes_nothing(activation, device, runs):
    x, *rest = (t.float() for t in tensors(activation, device, 40))
    given = rest if activation in GATED else (*rest[:2], None, None, rest[2])
    inputs = (x, *given)
    grad = torch.randn(40, 24, device=device)
    every = OPS.ffn_backward(grad, *inputs, None, None, activation, [True] * 6)
    for index in range(6):
        mask = [True] + [i == index for i in range(1, 6)]
        some = OPS.ffn_backward(grad, *inputs, None, None, activation, mask)
        for a, b, wanted, tensor in zip(some, every, mask, inputs, strict=True):
            assert a.numel() == (b.numel() if wanted and tensor is not None else 0)
            assert not a.numel() or a.equal(b)
    runs.clear()
    OPS.ffn_backward(grad, *inputs, None, None, activation, [False] + [True] * 5)
    assert not runs, "without dx there is no product to put the derivative into"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_forms_find_the_same_bits_where_neither_multiplies(activation, device, monkeypatch):
    x, *rest = (t.to(torch.bfloat16) for t in tensors(activation, device, 70))
    given = rest if activation in GATED else (*rest[:2], None, None, rest[2])
    grad = torch.randn(70, 24, device=device).to(torch.bfloat16)
    forms = []
    for fused in (False, True):
        monkeypatch.setattr(triton, "is_fused", lambda *_, answer=fused: answer)
        forms.append(OPS.ffn_backward(grad, x, *given, None, None, activation, [True] * 6))
    for index in (1, 3, 5):  # both give cuBLAS the same numbers, and have rounded them alike
        assert forms[0][index].equal(forms[1][index])


def test_nan_and_infinity_stay_in_their_row(device, runs):
    x, weight, bias, addend = (t.float() for t in tensors("relu", device, 40))
    hidden = torch.ones(40, 24, device=device)
    hidden[39] = torch.inf
    grad = torch.ones(40, 24, device=device)
    grad[0] = torch.nan
    arguments = (grad, x, weight, bias, None, None, addend, hidden, None, "relu")
    dx, *_ = OPS.ffn_backward(*arguments, [True] * 6)
    assert dx[0].isnan().all()
    assert dx[1:].isfinite().all()
    assert runs


def test_gradients_repeat_bit_for_bit(device, runs):
    leaves = [x.float().requires_grad_() for x in tensors("gelu", device, 300)]
    first, second = (
        torch.autograd.grad(by_kernel(*leaves, activation="gelu")[0].sum(), leaves)
        for _ in range(2)
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("shape", "F"), [((0, 7), 5), ((3, 0), 5), ((3, 7), 0)])
def test_sizes_of_zero(shape, F, device, runs):
    leaves = [x.float().requires_grad_() for x in tensors("swiglu", device, *shape, F)]
    found, expected = (
        torch.autograd.grad(f(*leaves, activation="swiglu")[0].sum(), leaves)
        for f in (by_kernel, by_reference)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_table_chooses_the_form(device, monkeypatch):
    table = json.loads((Path(gptopt.kernels.__file__).parent / "configs/ffn.json").read_text())
    forms = table["kernels"]["bwd_form"]
    assert any(entry["sizes"]["FUSED_C"] > 0 for entry in forms)
    assert any(entry["sizes"]["FUSED_C"] == 0 for entry in forms)
    widest = next(e["sizes"]["FUSED_C"] for e in forms if e.get("shape") == "relu")

    def fused(C, activation, F=32, stride=32, dtype=torch.float16):
        grad, weight = (torch.empty(n, dtype=dtype, device=device) for n in ((4, stride), (F, C)))
        return triton.is_fused(grad[:, :F], weight, None, activation)

    assert fused(widest, "relu")
    assert not fused(widest + 16, "relu"), "too many tiles would find the derivative anew"
    assert not fused(32, "gelu"), "a derivative that costs more than it saves"
    assert not fused(32, "relu", dtype=torch.float32), "without matrix units cuBLAS is faster"
    assert not fused(32, "relu", F=17, stride=17), "rows that begin anywhere"


@pytest.mark.parametrize("fused", [False, True])
def test_a_shipped_choice_runs_from_end_to_end(fused, device, check):
    activation = "relu2" if fused else "gelu"
    functions = (partial(f, activation=activation) for f in (by_kernel, by_reference))
    check(*functions, tensors(activation, device, 34, 32, 48), torch.bfloat16)
