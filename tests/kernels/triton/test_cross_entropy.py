"""cross_entropy's kernels against its reference body, option by option and chunk by chunk."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import gptopt.kernels  # noqa: F401 - registers the operators
from gptopt.kernels.cross_entropy import reference, triton

OPS = torch.ops.gptopt
HALVES = [torch.bfloat16, torch.float16]
C = 24
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {"label_smoothing": 1.0, "z_loss": 0.05, "softcap": 1.5},
]


def by_kernel(hidden, head_weight, *, targets, body=None, **options) -> tuple[Tensor]:
    defaults = {
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "softcap": None,
        "reduction": "mean",
    }
    body = body or OPS.cross_entropy
    return (body(hidden, head_weight, targets, *{**defaults, **options}.values()),)


by_reference = partial(by_kernel, body=reference.cross_entropy)


@pytest.fixture
def inputs(device):
    def make(*shape, V=50) -> tuple[list[Tensor], Tensor]:
        targets = torch.randint(0, V, shape, device=device)
        if targets.numel() > 2:
            targets.view(-1)[::3] = -100
            targets.view(-1)[1] = V - 1
        tensors = [
            torch.randn(s, dtype=torch.float64, device=device) for s in ((*shape, C), (V, C))
        ]
        return tensors, targets

    return make


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks where there are more than 4 tokens, and the sizes they had."""
    sizes = []
    rows = triton._rows

    def recorded(logits, *arguments, **options):
        sizes.append(len(logits))
        rows(logits, *arguments, **options)

    monkeypatch.setattr(triton, "MIN_TOKENS", 4)
    monkeypatch.setattr(triton, "_TILE", 2)
    monkeypatch.setattr(triton, "_rows", recorded)
    return sizes


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_loss_and_gradients_are_the_reference(options, reduction, dtype, inputs, check):
    tensors, targets = inputs(2, 5)
    options = {**options, "reduction": reduction, "targets": targets}
    check(partial(by_kernel, **options), partial(by_reference, **options), tensors, dtype)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (63,), (1, 1, 3)])
@pytest.mark.parametrize("V", [1, 50, 257])
def test_odd_sizes(shape, V, inputs, check):
    tensors, targets = inputs(*shape, V=V)
    options = {"targets": targets, "z_loss": 0.01, "label_smoothing": 0.1}
    options["reduction"] = "none" if V == 257 else "mean"
    check(partial(by_kernel, **options), partial(by_reference, **options), tensors)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("N", [1, 3, 8, 63, 129])
def test_chunks_change_nothing(reduction, N, inputs, small_chunks, check):
    tensors, targets = inputs(N, V=17)
    options = {"targets": targets, "reduction": reduction}
    check(partial(by_kernel, **options), partial(by_reference, **options), tensors)
    times = {"mean": 1, "none": 2}[reduction]
    assert len(small_chunks) == times * {1: 1, 3: 1, 8: 2, 63: 8, 129: 8}[N]
    assert sum(small_chunks) == times * N


def test_a_chunk_is_a_twelfth_or_so_of_a_large_batch_and_never_starves():
    chunk = triton.chunk_tokens
    for N, V in ((1, 50257), (2048, 50257), (5000, 50257), (65536, 50257), (2**20, 128256)):
        tokens = chunk(N, V, 2)
        assert tokens >= min(N, 2048), (N, tokens)
        assert tokens <= 2048 or tokens * V * 2 <= 512 * 2**20
    assert 8 <= 65536 / chunk(65536, 50257, 2) <= 16
    assert 8 <= 16384 / chunk(16384, 32000, 2) <= 16
    assert chunk(2**20, 128256, 2) == 2048
    assert chunk(4097, 50257, 2) % 128 == 0


def test_logits_are_never_whole_in_memory(inputs, small_chunks, monkeypatch):
    """No allocation of an operator's forward and backward reaches N x V elements, or near it."""
    (hidden, head_weight), targets = inputs(80, V=257)
    made = []
    for name in ("empty", "zeros"):
        function = getattr(torch, name)

        def counted(*args, function=function, **kwargs):
            made.append(function(*args, **kwargs).numel())
            return function(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    leaves = [x.float().requires_grad_() for x in (hidden, head_weight)]
    by_kernel(*leaves, targets=targets)[0].backward()
    assert len(small_chunks) == 8
    assert max(made) <= 257 * C  # dW; the logits have 80 * 257 elements


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 1, 7])
def test_all_targets_ignored_is_no_loss_and_no_gradient(reduction, ignore_index, inputs):
    tensors, targets = inputs(2, 3)
    hidden, head_weight = (x.float().requires_grad_() for x in tensors)
    targets.fill_(ignore_index)
    options = {"reduction": reduction, "ignore_index": ignore_index, "z_loss": 1.0}
    (loss,) = by_kernel(hidden, head_weight, targets=targets, **options)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (hidden.grad == 0).all()
    assert (head_weight.grad == 0).all()


@pytest.mark.parametrize("ignore_index", [1, 2**40])
def test_any_index_can_be_ignored(ignore_index, inputs, check):
    tensors, targets = inputs(9)
    targets[targets == -100] = ignore_index
    options = {"targets": targets, "ignore_index": ignore_index}
    check(partial(by_kernel, **options), partial(by_reference, **options), tensors)


def test_only_the_gradients_asked_for_are_made(inputs):
    (hidden, head_weight), targets = inputs(5)
    arguments = (hidden.float(), head_weight.float(), targets, -100, 0.0, 0.0, None)
    for mask in ([True, False], [False, True], [False, False]):
        _, *found = OPS.cross_entropy_forward(*arguments, "mean", mask)
        assert [x.numel() > 0 for x in found] == mask
        grad = torch.ones_like(targets, dtype=torch.float32)
        again = OPS.cross_entropy_backward(
            grad, *arguments[:3], None, None, *arguments[3:], "none", mask
        )
        assert [x.numel() > 0 for x in again] == mask


def test_a_mean_in_half_precision_loses_no_gradient_before_the_loss_scale(device):
    """Without the scale float16 would hold nothing but 0."""
    N, V, half = 16, 64, {"device": device, "dtype": torch.float16}
    hidden = torch.zeros(N, 2, **half, requires_grad=True)
    head_weight = torch.full((V, 2), 2.0**-10, **half)
    head_weight[0] += 2.0**-15  # the gradient of a token is 2^-21, that of the mean 2^-25
    (loss,) = by_kernel(
        hidden, head_weight, targets=torch.ones(N, dtype=torch.int64, device=device)
    )
    (loss * 2.0**16).backward()
    assert (hidden.grad == 2.0**-9).all()


def test_the_gradient_of_the_head_is_summed_in_float32(device, small_chunks):
    """Two tokens at a time: bfloat16 would forget each of the later ones."""
    N, V, half = 530, 2, {"device": device, "dtype": torch.bfloat16}
    hidden = torch.ones(N, 1, **half)
    head_weight = torch.zeros(V, 1, **half, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.int64, device=device)
    (loss,) = by_kernel(hidden, head_weight, targets=targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, head_weight)
    assert len(small_chunks) > 4
    assert gradient.flatten().tolist() == [-264.0, 264.0]  # 265, rounded once; not 256


def test_large_logits_do_not_overflow(device, check):
    hidden = torch.full((2, C), 1e3, dtype=torch.float64, device=device)
    head_weight = torch.randn(50, C, dtype=torch.float64, device=device) * 10
    options = {"targets": torch.tensor([0, 49], device=device)}
    check(partial(by_kernel, **options), partial(by_reference, **options), [hidden, head_weight])


def test_strided_inputs(inputs, check):
    (hidden, head_weight), targets = inputs(4, 5)
    wide = torch.randn(4, 5, 2 * C, dtype=torch.float64, device=hidden.device)
    for h, w in (
        (hidden.transpose(0, 1).contiguous().transpose(0, 1), head_weight.T.contiguous().T),
        (wide[..., C:], head_weight),
    ):
        options = {"targets": targets.T.contiguous().T}
        check(partial(by_kernel, **options), partial(by_reference, **options), [h, w])


def test_rows_that_share_memory(inputs):
    tensors, targets = inputs(4, 5)
    hidden, head_weight = (x.float() for x in tensors)
    hidden = hidden[:, :1].expand(4, 5, C)
    found, expected = (
        body(hidden, head_weight, targets=targets)[0] for body in (by_kernel, by_reference)
    )
    torch.testing.assert_close(found, expected)


def test_a_grad_of_any_stride_reaches_every_row(inputs):
    tensors, targets = inputs(4, 5)
    gradients = []
    for body in (None, reference.cross_entropy):
        leaf = tensors[0].float().requires_grad_()
        (loss,) = by_kernel(leaf, tensors[1].float(), targets=targets, body=body, reduction="none")
        grad = torch.arange(4.0, device=leaf.device)[:, None].expand(4, 5)
        gradients.append(torch.autograd.grad(loss, leaf, grad)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sizes_of_zero(reduction, inputs):
    tensors, targets = inputs(2, 0)
    hidden, head_weight = (x.float().requires_grad_() for x in tensors)
    (loss,) = by_kernel(hidden, head_weight, targets=targets, reduction=reduction)
    assert loss.shape == (targets.shape if reduction == "none" else ())
    loss.sum().backward()
    assert hidden.grad.shape == (2, 0, C)
    assert (head_weight.grad == 0).all()
    targets = torch.tensor([1, 2], device=targets.device)
    none = torch.zeros(2, 0, device=targets.device), torch.zeros(4, 0, device=targets.device)
    torch.testing.assert_close(by_kernel(*none, targets=targets)[0].item(), math.log(4))


def test_autocast_leaves_the_dtypes_of_the_operator_alone(inputs):
    tensors, targets = inputs(6)
    hidden, head_weight = (x.float() for x in tensors)
    (expected,) = by_kernel(hidden, head_weight, targets=targets)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        (loss,) = by_kernel(hidden, head_weight, targets=targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_float64_runs_the_reference_body(inputs):
    (hidden, head_weight), targets = inputs(6)
    assert "float64" in triton.supports(hidden)
    assert triton.supports(hidden.float(), head_weight.float(), targets) is None
    leaves = [x.requires_grad_() for x in (hidden, head_weight)]
    assert torch.autograd.gradcheck(partial(by_kernel, targets=targets), leaves, fast_mode=True)


@pytest.mark.parametrize("target", [50, -1, 2**40])
def test_a_target_outside_the_vocabulary_is_nan_not_a_number_from_elsewhere(target, inputs):
    tensors, targets = inputs(4)
    hidden, head_weight = (x.float().requires_grad_() for x in tensors)
    targets[:] = torch.tensor([1, target, -100, 3])
    (loss,) = by_kernel(hidden, head_weight, targets=targets, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    loss.sum().backward()
    assert hidden.grad.isnan().any(-1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])  # float32: test_integration.py
def test_opcheck(reduction, dtype, inputs):
    tensors, targets = inputs(2, 3)
    hidden, head_weight = (x.to(dtype) for x in tensors)
    options = (-100, 0.1, 1e-3, 5.0, reduction)
    leaves = [x.clone().requires_grad_() for x in (hidden, head_weight)]
    opcheck(OPS.cross_entropy.default, (*leaves, targets, *options))
    plain = (hidden, head_weight, targets)
    opcheck(OPS.cross_entropy_forward.default, (*plain, *options, [True, True]))
    found = OPS.cross_entropy_forward(*plain, *options, [True, True])[1:]
    grad = torch.randn(targets.shape if reduction == "none" else ())
    kept = (None, None) if reduction == "none" else found
    arguments = (grad.to(hidden.device), *plain, *kept, *options, [True, True])
    opcheck(OPS.cross_entropy_backward.default, arguments)


def test_compiles_without_a_break(inputs):
    tensors, targets = inputs(2, 3)
    leaves = [x.float().requires_grad_() for x in tensors]
    compiled = torch.compile(
        partial(by_kernel, targets=targets), fullgraph=True, backend="aot_eager"
    )
    (loss,), (expected,) = compiled(*leaves), by_kernel(*leaves, targets=targets)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
