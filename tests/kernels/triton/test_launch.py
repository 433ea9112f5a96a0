"""The helpers every kernel is built from: rounding, the dropout mask, the configuration tables."""

import json

import pytest
import torch
import triton.language as tl

from gptopt.kernels import launch, philox
from gptopt.kernels.launch import cast, dot_operand, jit, keep_linear, keep_mask


@jit
def cast_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, cast(x, y_ptr.dtype.element_ty), mask=i < n)


@jit
def linear_kernel(out_ptr, seed_ptr, start, threshold, n, N: tl.constexpr):
    i = tl.arange(0, N)
    keep = keep_linear(seed_ptr, start + i.to(tl.int64), threshold)
    tl.store(out_ptr + i, keep, mask=i < n)


@jit
def plane_kernel(out_ptr, seed_ptr, high, plane, threshold, N: tl.constexpr):
    i = tl.arange(0, N)
    keep = keep_mask(seed_ptr, i[None, :], (high + i)[:, None], plane, threshold)
    tl.store(out_ptr + i[:, None] * N + i[None, :], keep)


@jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    a, b = tl.load(a_ptr + square), tl.load(b_ptr + square)
    tl.store(c_ptr + square, tl.dot(dot_operand(a), dot_operand(b)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cast_rounds_as_torch_does(device, dtype):
    x = torch.randn(100) * torch.logspace(-3, 3, 100)
    x[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.00390625])
    x = x.to(device)
    y = torch.empty(100, dtype=dtype, device=device)
    launch.launch(cast_kernel, (1,), x, x, y, 100, N=128)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", [5, 2**40 + 3, -77])
@pytest.mark.parametrize("start", [0, 2**32 - 50, 2**33 + 9])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_the_dropout_mask_is_that_of_the_reference_bit_for_bit(device, seed, start, p):
    seed = torch.tensor(seed, device=device)
    found = torch.zeros(100, dtype=torch.bool, device=device)
    threshold = launch.dropout_threshold(p)
    launch.launch(linear_kernel, (1,), found, found, seed, start, threshold, 100, N=128)
    index = torch.arange(100, device=device) + start
    expected = philox.keep_mask(seed, p, index & 0xFFFFFFFF, index >> 32, torch.zeros_like(seed))
    assert torch.equal(found, expected)


def test_the_mask_of_attention_has_a_row_and_a_plane(device):
    seed = torch.tensor(2**35 + 1, device=device)
    found = torch.zeros(16, 16, dtype=torch.bool, device=device)
    launch.launch(plane_kernel, (1,), found, found, seed, 7, 3, launch.dropout_threshold(0.4), N=16)
    i = torch.arange(16, device=device)
    plane = torch.tensor(3, device=device)
    assert torch.equal(found, philox.keep_mask(seed, 0.4, i, i[:, None] + 7, plane))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dot_of_any_dtype_is_a_dot(device, dtype):
    a, b = (torch.randn(16, 16, device=device).to(dtype) for _ in range(2))
    c = torch.empty(16, 16, device=device)
    launch.launch(dot_kernel, (1,), a, a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float())


def test_a_configuration_is_the_first_entry_that_fits(tmp_path, monkeypatch):
    table = [
        {"arch": "sm_90", "dtype": "bfloat16", "sizes": {"M": 64}, "num_warps": 8, "num_stages": 3},
        {"shape": "d64", "num_warps": 2, "num_stages": 2},
        {"num_warps": 4, "num_stages": 1},
    ]
    (tmp_path / "thing.json").write_text(json.dumps({"kernels": {"fwd": table}}))
    monkeypatch.setattr(launch, "_CONFIGS", tmp_path)
    best = launch.choose("thing.fwd", "sm_90", torch.bfloat16, "d64")
    assert best.options == {"M": 64, "num_warps": 8, "num_stages": 3}
    assert launch.choose("thing.fwd", "sm_90", torch.float32, "d64").num_warps == 2
    assert launch.choose("thing.fwd", "sm_80", torch.float32, "d64 masked").num_warps == 2
    assert launch.choose("thing.fwd", "sm_80", torch.float32, "d640 masked").num_warps == 4
    assert launch.choose("thing.fwd", "gfx942", torch.float32).num_warps == 4


def test_every_shipped_table_ends_with_an_entry_for_everything_and_says_its_source():
    for path in launch._CONFIGS.glob("*.json"):
        table = json.loads(path.read_text())
        assert table["source"]
        for entries in table["kernels"].values():
            last = entries[-1]
            assert not {"arch", "dtype", "shape"} & set(last)
            for entry in entries:
                extra = {"arch", "dtype", "shape", "sizes", "num_warps", "num_stages"}
                assert set(entry) <= extra
