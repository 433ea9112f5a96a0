"""ffn's kernels against its reference body, activation by activation."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from gptopt.kernels import ffn
from gptopt.kernels.ffn import reference, triton

OPS = torch.ops.gptopt
HALVES = [torch.bfloat16, torch.float16]
ORDER = ("weight", "bias", "gate_weight", "gate_bias", "addend")
PLAIN = [("weight",), ("weight", "bias"), ("weight", "addend"), ("weight", "bias", "addend")]
GATED = [("weight", "gate_weight"), ("weight", "bias", "gate_weight"), ORDER]
CASES = [(a, n) for a in ("relu", "relu2", "gelu", "gelu_tanh") for n in PLAIN]
CASES += [(a, n) for a in reference.GATED for n in GATED]
FULL = dict(CASES)  # each activation with all its tensors


def by_kernel(x, *rest, names, activation, body=None) -> tuple[Tensor]:
    given = dict(zip(names, rest, strict=True))
    body = body or OPS.ffn
    return (body(x, *(given.get(name) for name in ORDER), activation),)


by_reference = partial(by_kernel, body=reference.ffn)


@pytest.fixture
def inputs(device):
    def make(names, shape=(2, 3, 7), F=5) -> list[Tensor]:
        C = shape[-1]
        shapes = {"addend": (*shape[:-1], F), "bias": (F,), "gate_bias": (F,)}
        sizes = [shape, *(shapes.get(name, (F, C)) for name in names)]
        return [torch.randn(size, dtype=torch.float64, device=device) for size in sizes]

    return make


@pytest.fixture
def few_programs(monkeypatch):
    """The elementwise backward shares its rows between two or so, each with several blocks."""
    monkeypatch.setattr(triton, "PROGRAMS", 4)


@pytest.mark.parametrize(("activation", "names"), CASES)
def test_results_and_gradients_are_the_reference(activation, names, inputs, check):
    options = {"names": names, "activation": activation}
    check(partial(by_kernel, **options), partial(by_reference, **options), inputs(names))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", FULL)
def test_half_precision(activation, dtype, inputs, check):
    options = {"names": FULL[activation], "activation": activation}
    tensors = inputs(FULL[activation], (9, 40), 24)
    check(partial(by_kernel, **options), partial(by_reference, **options), tensors, dtype)


@pytest.mark.parametrize("M", [1, 3, 63, 129])
@pytest.mark.parametrize(("C", "F"), [(1, 1), (33, 50), (64, 32)])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_odd_sizes(M, C, F, activation, inputs, few_programs, check):
    options = {"names": FULL[activation], "activation": activation}
    tensors = inputs(FULL[activation], (M, C), F)
    check(partial(by_kernel, **options), partial(by_reference, **options), tensors)


@pytest.mark.parametrize("shape", [(7,), (1, 1, 1), (2, 1, 2, 3)])
def test_any_number_of_dimensions(shape, inputs, check):
    options = {"names": ORDER, "activation": "geglu"}
    check(partial(by_kernel, **options), partial(by_reference, **options), inputs(ORDER, shape))


def test_far_from_zero_every_activation_is_finite_and_exact(device):
    x = torch.tensor([-1e4, -88.0, -9.0, -1e-30, 0.0, 1e-30, 9.0, 88.0, 1e4], device=device)
    one = torch.eye(1, device=device)
    for activation in FULL:
        gate = one if activation in reference.GATED else None
        results = []
        for body in (OPS.ffn, reference.ffn):
            leaf = x[:, None].clone().requires_grad_()
            out = body(leaf, one, None, gate, None, None, activation)
            results.append((out, torch.autograd.grad(out.sum(), leaf)[0]))
        torch.testing.assert_close(*results, msg=lambda m, a=activation: f"{a}: {m}")


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_a_nan_is_not_swallowed(activation, device):
    x = torch.full((2, 3), float("nan"), device=device)
    assert OPS.ffn(x, torch.ones(4, 3, device=device), *(None,) * 4, activation).isnan().all()


def test_strided_inputs(inputs, check):
    x, weight, bias, gate_weight, gate_bias, addend = inputs(ORDER, (4, 6, 7), 5)
    wide = torch.randn(4, 6, 3, 7, dtype=torch.float64, device=x.device)
    padded = torch.randn(5, 9, dtype=torch.float64, device=x.device)
    options = {"names": ORDER, "activation": "swiglu"}
    variants = [
        (wide[:, :, 1], weight, bias, padded[:, :7], gate_bias, addend),  # a view of a fused x
        (x.mT.contiguous().mT, weight.T.contiguous().T, bias, gate_weight, gate_bias, addend),
        (x.transpose(0, 1), weight, bias, gate_weight, padded[:, 3], addend.mT.reshape(4, 6, 5)),
        (x, padded[:, 1:8], bias, gate_weight, gate_bias, wide[:, :, 2, :5]),
    ]
    for i, tensors in enumerate(variants):
        if i == 2:
            tensors = (tensors[0], *tensors[1:-1], tensors[-1].transpose(0, 1))
        check(partial(by_kernel, **options), partial(by_reference, **options), tensors)


def test_a_grad_of_any_stride(inputs):
    tensors = [x.float() for x in inputs(ORDER)]
    gradients = []
    for function in (by_kernel, by_reference):
        leaves = [x.clone().requires_grad_() for x in tensors]
        (out,) = function(*leaves, names=ORDER, activation="geglu")
        grad = torch.arange(6.0, device=out.device).view(2, 3, 1).expand(2, 3, 5)
        gradients.append(torch.autograd.grad(out, leaves, grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_backward_without_what_was_kept_computes_it_again(activation, inputs):
    given = dict(zip(FULL[activation], inputs(FULL[activation])[1:], strict=True))
    x = inputs(())[0].float()
    tensors = (x, *(given[n].float() if n in given else None for n in ORDER))
    out, hidden, gate = OPS.ffn_forward(*tensors, activation)
    assert out.equal(OPS.ffn(*tensors, activation))
    expected = reference.project(*tensors)
    torch.testing.assert_close(hidden, expected[0])
    if activation == "swiglu":
        torch.testing.assert_close(gate, expected[1])
    grad = torch.randn_like(out)
    mask = [y is not None for y in tensors]
    kept = OPS.ffn_backward(grad, *tensors, hidden, gate, activation, mask)
    again = OPS.ffn_backward(grad, *tensors, None, None, activation, mask)
    for a, b in zip(kept, again, strict=True):
        assert a.equal(b)


def saved_elements(function) -> tuple[Tensor, int]:
    """The result of `function`, and how many elements autograd keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.itemsize
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    return out, sum(kept.values())


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("activation", "names"), [("gelu", ("weight",)), ("swiglu", ("weight", "gate_weight"))]
)
def test_recompute_keeps_the_arguments_alone_and_changes_no_number(impl, activation, names, inputs):
    x, *rest = (t.float().requires_grad_() for t in inputs(names, (6, 7), 64))
    given = {"bias": None, **dict(zip(names, rest, strict=True))}
    weight, bias = given.pop("weight"), given.pop("bias")
    results = []
    for recompute in (False, True):
        out, kept = saved_elements(
            lambda r=recompute: ffn(
                x, weight, bias, activation=activation, recompute=r, impl=impl, **given
            )
        )
        gradients = torch.autograd.grad(out.square().sum(), (x, *rest))
        results.append((kept, out, gradients))
    (more, out, gradients), (less, again, gradients_again) = results
    assert more - less >= out.numel()
    assert less <= sum(t.numel() for t in (x, *rest))
    assert out.equal(again)
    for a, b in zip(gradients, gradients_again, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("index", range(6))
def test_only_the_gradients_asked_for_are_made(index, inputs):
    tensors = [x.float() for x in inputs(ORDER)]
    grad = torch.randn(2, 3, 5, device=tensors[0].device)
    every = OPS.ffn_backward(grad, *tensors, None, None, "swiglu", [True] * 6)
    mask = [i == index for i in range(6)]
    one = OPS.ffn_backward(grad, *tensors, None, None, "swiglu", mask)
    assert [x.numel() > 0 for x in one] == mask
    torch.testing.assert_close(one[index], every[index])
    none = OPS.ffn_backward(grad, *tensors, None, None, "swiglu", [False] * 6)
    assert not any(x.numel() for x in none)


@pytest.mark.parametrize(("shape", "F"), [((0, 7), 5), ((2, 0, 7), 5), ((3, 0), 5), ((3, 7), 0)])
def test_sizes_of_zero(shape, F, inputs):
    tensors = [x.float().requires_grad_() for x in inputs(ORDER, shape, F)]
    results = []
    for function in (by_kernel, by_reference):
        (out,) = function(*tensors, names=ORDER, activation="geglu")
        results.append((out, *torch.autograd.grad(out.sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_bias_gradients_repeat_bit_for_bit(inputs, few_programs):
    tensors = [x.float().requires_grad_() for x in inputs(("weight", "bias"), (300, 7), 40)]
    runs = []
    for _ in range(2):
        (out,) = by_kernel(*tensors, names=("weight", "bias"), activation="gelu")
        runs.append(torch.autograd.grad(out.sum(), tensors))
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


def test_autocast_leaves_the_dtypes_of_the_operator_alone(inputs):
    tensors = [x.float() for x in inputs(ORDER)]
    options = {"names": ORDER, "activation": "swiglu"}
    (expected,) = by_kernel(*tensors, **options)
    leaves = [x.clone().requires_grad_() for x in tensors]
    with torch.autocast(expected.device.type, torch.bfloat16):
        (out,) = by_kernel(*leaves, **options)
        assert out.equal(expected)
        out.sum().backward()
    (again,) = by_kernel(*(x.requires_grad_() for x in tensors), **options)
    again.sum().backward()
    for a, b in zip(leaves, tensors, strict=True):
        assert a.grad.equal(b.grad)


def test_float64_runs_the_reference_body(inputs):
    tensors = inputs(ORDER)
    assert "float64" in triton.supports(*tensors)
    assert triton.supports(tensors[0].float()) is None
    function = partial(by_kernel, names=ORDER, activation="swiglu")
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16])  # float32: test_integration.py
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_opcheck(dtype, activation, inputs):
    names = FULL[activation]
    x, *rest = (t.to(dtype) for t in inputs(names))
    given = dict(zip(names, rest, strict=True))
    plain = (x, *(given.get(name) for name in ORDER))
    leaves = tuple(t if t is None else t.clone().requires_grad_() for t in plain)
    opcheck(OPS.ffn.default, (*leaves, activation))
    opcheck(OPS.ffn.default, (*leaves, activation, True))
    opcheck(OPS.ffn_forward.default, (*plain, activation))
    out, hidden, gate = OPS.ffn_forward(*plain, activation)
    mask = [t is not None for t in plain]
    opcheck(OPS.ffn_backward.default, (out, *plain, hidden, gate, activation, mask))
    opcheck(OPS.ffn_backward.default, (out, *plain, None, None, activation, [True, False] * 3))


def test_compiles_without_a_break(inputs):
    leaves = [x.float().requires_grad_() for x in inputs(ORDER)]
    function = partial(by_kernel, names=ORDER, activation="swiglu")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (out,), (expected,) = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
