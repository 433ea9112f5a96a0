"""cross_entropy against its formula written out, one token at a time."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptopt.kernels import cross_entropy

V, C = 11, 6
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 1.5},
    {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 2.0, "ignore_index": 3},
]


def by_formula(
    hidden,
    head_weight,
    *,
    targets,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
) -> tuple[Tensor]:
    losses = []
    logits = (hidden @ head_weight.T).view(-1, head_weight.shape[0])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    for s, target in zip(logits, targets.flatten().tolist(), strict=True):
        if target == ignore_index:
            losses.append(s.sum() * 0)
            continue
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        lse = s.exp().sum().log()
        loss = (1 - label_smoothing) * (lse - s[target]) + label_smoothing * (lse - s.mean())
        losses.append(loss + z_loss * lse**2)
    loss = torch.stack(losses)
    counted = max(1, int((targets != ignore_index).sum()))
    match reduction:
        case "none":
            return (loss.view(targets.shape),)
        case "sum":
            return (loss.sum(),)
        case _:
            return (loss.sum() / counted,)


def by_operator(hidden, head_weight, *, targets, **options) -> tuple[Tensor]:
    return (cross_entropy(hidden, head_weight, targets, **options),)


def inputs(*shape) -> tuple[list[Tensor], Tensor]:
    targets = torch.randint(0, V, shape)
    if targets.numel() > 2:
        targets.view(-1)[::3] = -100
        targets.view(-1)[1] = 3
    return [torch.randn(*s, dtype=torch.float64) for s in ((*shape, C), (V, C))], targets


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_results_and_gradients_follow_the_formula(options, reduction, path, check):
    tensors, targets = inputs(2, 5)
    if "ignore_index" in options:
        targets[targets == -100] = 3
    options = {**options, "reduction": reduction, "targets": targets}
    check(partial(by_operator, **options), partial(by_formula, **options), tensors)


@pytest.mark.parametrize("shape", [(), (1,), (63,), (1, 1, 3)])
def test_odd_shapes(shape, path, check):
    tensors, targets = inputs(*shape)
    options = {"targets": targets, "reduction": "none"}
    check(partial(by_operator, **options), partial(by_formula, **options), tensors)


@pytest.mark.parametrize("options", OPTIONS[:4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_within_its_budget(options, dtype, path, check):
    tensors, targets = inputs(2, 9)
    options = {**options, "targets": targets}
    check(partial(by_operator, **options), partial(by_formula, **options), tensors, dtype)


def test_loss_is_float32_for_lower_precision(path):
    (hidden, head_weight), targets = inputs(4)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert (
            cross_entropy(hidden.to(dtype), head_weight.to(dtype), targets).dtype == torch.float32
        )
    assert cross_entropy(hidden, head_weight, targets).dtype == torch.float64


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]])
def test_all_targets_ignored_is_no_loss_and_no_gradient(reduction, options, path):
    (hidden, head_weight), targets = inputs(2, 3)
    hidden.requires_grad_()
    head_weight.requires_grad_()
    targets.fill_(-100)
    loss = cross_entropy(hidden, head_weight, targets, reduction=reduction, **options)
    assert (loss == 0).all()
    loss.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
    assert head_weight.grad is not None
    assert (head_weight.grad == 0).all()


def test_mean_is_torchs_own(path):
    (hidden, head_weight), targets = inputs(3, 7)
    expected = F.cross_entropy((hidden @ head_weight.T).view(-1, V), targets.view(-1))
    torch.testing.assert_close(cross_entropy(hidden, head_weight, targets), expected)


@pytest.mark.parametrize("options", OPTIONS[:4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(options, reduction, path):
    tensors, targets = inputs(2, 3)
    leaves = [x.requires_grad_() for x in tensors]
    function = partial(by_operator, targets=targets, reduction=reduction, **options)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_asked_for_are_made(reduction, path):
    (hidden, head_weight), targets = inputs(2, 3)
    hidden.requires_grad_()
    cross_entropy(hidden, head_weight, targets, reduction=reduction).sum().backward()
    assert hidden.grad is not None
    assert head_weight.grad is None


def test_no_gradient_is_prepared_where_none_is_wanted(path):
    (hidden, head_weight), targets = inputs(2, 3)
    assert not cross_entropy(hidden, head_weight, targets).requires_grad


def test_scaled_loss_scales_the_gradients(path):
    (hidden, head_weight), targets = inputs(2, 3)
    gradients = []
    for factor in (1.0, 128.0):
        leaf = hidden.float().requires_grad_()
        loss = cross_entropy(leaf, head_weight.float(), targets)
        gradients.append(torch.autograd.grad(loss * factor, leaf)[0])
    torch.testing.assert_close(gradients[0] * 128, gradients[1])


def test_large_logits_do_not_overflow(path):
    hidden, head_weight = torch.full((2, C), 1e4), torch.randn(V, C) * 100
    loss = cross_entropy(hidden.requires_grad_(), head_weight, torch.tensor([0, 1]), z_loss=1e-9)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_strided_inputs_give_the_same_numbers(path, check):
    tensors, targets = inputs(4, 5)

    def function(hidden, head_weight, strided):
        if strided:
            hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
            head_weight = head_weight.T.contiguous().T
            return (cross_entropy(hidden, head_weight, targets.T.contiguous().T),)
        return (cross_entropy(hidden, head_weight, targets),)

    check(partial(function, strided=True), partial(function, strided=False), tensors)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sizes_of_zero(reduction, path):
    (hidden, head_weight), targets = inputs(2, 0)
    loss = cross_entropy(hidden.requires_grad_(), head_weight, targets, reduction=reduction)
    assert loss.shape == (targets.shape if reduction == "none" else ())
    loss.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (2, 0, C)


def test_autocast_lowers_the_product_and_keeps_the_loss(path):
    (hidden, head_weight), targets = inputs(2, 3)
    hidden, head_weight = hidden.float().requires_grad_(), head_weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, head_weight, targets)
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ head_weight.bfloat16().T).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(-1, V), targets.view(-1)))
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_a_target_outside_the_vocabulary_is_an_index_error(path):
    (hidden, head_weight), _ = inputs(1)
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(hidden, head_weight, torch.tensor([V]))


X, W, TARGETS = torch.zeros(2, 3, C), torch.zeros(V, C), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": X.int()}, "hidden is of dtype torch.int32"),
        ({"hidden": torch.tensor(0.0)}, r"hidden is of shape \(\)"),
        ({"head_weight": W.T}, rf"head_weight is of shape \({C}, {V}\), expected \(V, C\)"),
        ({"head_weight": W.half()}, "head_weight is of dtype torch.float16"),
        ({"targets": TARGETS.int()}, "targets is of dtype torch.int32, expected torch.int64"),
        ({"targets": TARGETS[0]}, r"targets is of shape \(3,\), expected .* = \(2, 3\)"),
        ({"targets": TARGETS.to("meta")}, "targets is on meta, expected cpu as hidden"),
        ({"label_smoothing": 1.1}, r"label_smoothing is 1\.1"),
        ({"z_loss": -1.0}, r"z_loss is -1\.0, expected a number >= 0"),
        ({"softcap": -2.0}, r"softcap is -2\.0"),
        ({"reduction": "max"}, "reduction is 'max', expected 'mean', 'sum' or 'none'"),
        ({"impl": "jit"}, "impl is 'jit'"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{"hidden": X, "head_weight": W, "targets": TARGETS, **changed})
