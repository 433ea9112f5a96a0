"""rotary against complex numbers: a pair of channels is a number, a position is its angle."""

from functools import partial

import pytest
import torch
from torch import Tensor

from gptopt.kernels import rotary

B, H, K, T, D = 2, 4, 2, 5, 8


def angles(R, rows=1) -> Tensor:
    position = torch.arange(T, dtype=torch.float64) + 3 * torch.arange(rows)[:, None]
    return position[:, :, None] * 10.0 ** -torch.arange(R, dtype=torch.float64)


def turned(x, angle, interleaved) -> Tensor:
    R = angle.shape[-1]
    head, rest = x[..., : 2 * R], x[..., 2 * R :]
    pairs = head.unflatten(-1, (R, 2) if interleaved else (2, R))
    pairs = pairs if interleaved else pairs.mT
    wide = pairs.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    number = torch.view_as_complex(wide) * torch.polar(torch.ones_like(angle), angle).unsqueeze(
        1
    ).to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    pairs = torch.view_as_real(number)
    head = (pairs if interleaved else pairs.mT).flatten(-2)
    return torch.cat((head.to(x.dtype), rest), -1)


def by_complex_numbers(q, k, *, angle, interleaved) -> tuple[Tensor, Tensor]:
    return turned(q, angle, interleaved), turned(k, angle, interleaved)


def by_operator(q, k, *, angle, interleaved) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    return rotary(q, k, *tables, interleaved=interleaved)


def heads() -> list[Tensor]:
    return [torch.randn(B, n, T, D, dtype=torch.float64) for n in (H, K)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [4, 3, 1])
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_rotations(interleaved, R, rows, dtype, path, check):
    options = {"angle": angles(R, rows), "interleaved": interleaved}
    oracle = partial(by_complex_numbers, **options)
    check(partial(by_operator, **options), oracle, heads(), dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved, path):
    leaves = [x.requires_grad_() for x in heads()]
    function = partial(by_operator, angle=angles(3, B), interleaved=interleaved)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_rotation_keeps_lengths_and_shifts_with_the_position(path):
    q, k = heads()
    angle = angles(D // 2)
    turned_q, turned_k = by_operator(q, k, angle=angle, interleaved=False)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    shifted = by_operator(q, k, angle=angle + angle[:, 1:2] * 7, interleaved=False)
    scores = turned_q[:, :K] @ turned_k.mT
    torch.testing.assert_close(scores, shifted[0][:, :K] @ shifted[1].mT)


def test_strided_inputs_give_the_same_numbers(path, check):
    fused = torch.randn(B, T, (H + K) * D, dtype=torch.float64)

    def function(x, strided):
        q, k = (y.unflatten(-1, (-1, D)).transpose(1, 2) for y in x.split([H * D, K * D], -1))
        if not strided:
            q, k = q.contiguous(), k.contiguous()
        return by_operator(q, k, angle=angles(3), interleaved=True)

    check(partial(function, strided=True), partial(function, strided=False), [fused])


def test_only_the_gradients_asked_for_are_made(path):
    q, k = heads()
    a, b = by_operator(q.requires_grad_(), k, angle=angles(4), interleaved=False)
    (a.sum() + b.sum()).backward()
    assert q.grad is not None
    assert k.grad is None


@pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0)])
def test_sizes_of_zero(B, T, path):
    q, k = torch.zeros(B, H, T, D, requires_grad=True), torch.zeros(B, K, T, D)
    table = torch.zeros(1, T, 3)
    a, b = rotary(q, k, table, table)
    assert a.shape == q.shape
    assert b.shape == k.shape
    a.sum().backward()
    assert q.grad is not None


Q, TABLE = torch.zeros(B, H, T, D), torch.zeros(1, T, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, r"q is of shape \(4, 5, 8\), expected \(B, H, T, D\)"),
        ({"q": Q.long()}, "q is of dtype torch.int64"),
        ({"k": Q[:, :, :2]}, r"k is of shape .*expected \(B, K, T, D\) = \(2, K, 5, 8\)"),
        ({"k": Q.half()}, "k is of dtype torch.float16, expected torch.float32 as q"),
        ({"cos": TABLE[0]}, r"cos is of shape \(5, 4\), expected \(B or 1, T, R\)"),
        ({"cos": torch.zeros(3, T, 4)}, r"cos is of shape \(3, 5, 4\)"),
        ({"cos": torch.zeros(1, T, 5)}, r"cos is of shape \(1, 5, 5\), .*R <= D / 2 = 4"),
        ({"sin": torch.zeros(1, T, 3)}, r"sin is of shape \(1, 5, 3\), expected \(1, 5, 4\)"),
        ({"sin": TABLE.to("meta")}, "sin is on meta"),
        ({"cos": TABLE.clone().requires_grad_()}, "cos is a tensor that requires a gradient"),
        ({"impl": "x"}, "impl is 'x'"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        rotary(**{"q": Q, "k": Q, "cos": TABLE, "sin": TABLE, **changed})
