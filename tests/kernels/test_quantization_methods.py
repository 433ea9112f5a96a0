"""Which way of rounding errs less, by how much, and on what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptopt.kernels.quantization import dequantize, quantize

FORMATS = [(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


def correlated(K, n=2048, seed=0):
    """Inputs (n, K) as layers see them: few strong directions, and channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(K, K, generator=generator))
    strength = torch.arange(1, K + 1).float() ** -0.5
    mixed = (directions * strength) @ torch.randn(K, K, generator=generator)
    mixed *= torch.exp(0.5 * torch.randn(K, generator=generator))
    return torch.randn(n, K, generator=generator) @ mixed


def error(blocks, weight, hessian=None):
    """Relative error of the weight, or of its products with inputs."""
    rest = dequantize(blocks) - weight
    if hessian is None:
        return (rest.norm() / weight.norm()).item()
    return (((rest @ hessian) * rest).sum() / ((weight @ hessian) * weight).sum()).sqrt().item()


@pytest.fixture(scope="module")
def layer():
    """(weight, hessian of the inputs it is quantised for, hessian of others of the same kind)."""
    x = correlated(128, 4096)
    weight = 0.02 * torch.randn(192, 128, generator=torch.Generator().manual_seed(1))
    half = len(x) // 2
    return weight, x[:half].T @ x[:half] / half, x[half:].T @ x[half:] / half


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_a_search_errs_less_than_rounding(bits, symmetric):
    weight = torch.randn(64, 128)
    nearest, searched = (
        error(quantize(weight, bits=bits, block=32, symmetric=symmetric, method=method), weight)
        for method in ("nearest", "search")
    )
    assert searched < {2: 0.93, 4: 0.96, 8: 0.995}[bits] * nearest


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.booleans(), st.integers(1, 80))
def test_a_search_never_errs_more_in_any_block(seed, bits, symmetric, columns):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, columns, generator=generator)
    importance = torch.rand(columns, generator=generator) ** 4
    found = [
        quantize(weight, bits=bits, block=16, symmetric=symmetric, method=method, importance=given)
        for method, given in (("nearest", None), ("search", importance))
    ]
    squares = [(dequantize(blocks) - weight).square() * importance for blocks in found]
    nearest, searched = (
        torch.nn.functional.pad(each, (0, -columns % 16)).unflatten(1, (-1, 16)).sum(-1)
        for each in squares
    )
    assert (searched <= nearest * 1.0001 + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_importance_moves_the_error_to_where_it_does_not_count(layer, bits):
    weight, hessian, _ = layer
    options = {"bits": bits, "block": 32, "method": "search"}
    plain = quantize(weight, **options)
    weighted = quantize(weight, importance=hessian.diagonal(), **options)
    assert error(weighted, weight, hessian) < 0.97 * error(plain, weight, hessian)


@pytest.mark.parametrize(("bits", "block", "symmetric"), [
    (4, 32, True), (4, 64, False), (4, 128, True), (2, 32, True), (2, 32, False), (8, 64, True),
])  # fmt: skip
def test_error_feedback_errs_much_less_on_correlated_inputs(layer, bits, block, symmetric):
    weight, hessian, others = layer
    options = {"bits": bits, "block": block, "symmetric": symmetric}
    searched = quantize(weight, method="search", importance=hessian.diagonal(), **options)
    fed_back = quantize(weight, method="gptq", hessian=hessian, **options)
    assert error(fed_back, weight, hessian) < 0.7 * error(searched, weight, hessian)
    # And on inputs that it has not seen.
    assert error(fed_back, weight, others) < 0.75 * error(searched, weight, others)


def test_wide_blocks_with_feedback_beat_narrow_ones_without(layer):
    weight, hessian, _ = layer
    narrow = quantize(weight, bits=4, block=32)
    wide = quantize(weight, bits=4, block=128, method="gptq", hessian=hessian)
    assert error(wide, weight, hessian) < 0.8 * error(narrow, weight, hessian)


def test_descent_mends_what_the_greedy_walk_left(layer, monkeypatch):
    import sys

    weight, hessian, _ = layer
    options = {"bits": 4, "block": 32, "method": "gptq", "hessian": hessian}
    mended = error(quantize(weight, **options), weight, hessian)
    module = sys.modules["gptopt.kernels.quantization.gptq"]
    monkeypatch.setattr(module, "descend", lambda w, found, *_, **__: found)
    assert mended < 0.95 * error(quantize(weight, **options), weight, hessian)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_never_come_and_odd_widths_are_no_trouble(symmetric):
    x = correlated(100)
    x[:, 7] = 0
    x[:, 40] = x[:, 41]  # singular without damping
    hessian = x.T @ x / len(x)
    weight = torch.randn(9, 100)
    weight[3] = 0
    blocks = quantize(weight, bits=4, block=32, symmetric=symmetric, method="gptq", hessian=hessian)
    found = dequantize(blocks)
    assert torch.isfinite(found).all()
    assert (found[3] == 0).all()
    assert error(blocks, weight, hessian) < 0.1


def test_few_inputs_are_enough_to_be_no_worse_than_a_search():
    x = correlated(128, 16)
    hessian, weight = x.T @ x / len(x), torch.randn(64, 128)
    options = {"bits": 4, "block": 32}
    searched = quantize(weight, method="search", **options)
    fed_back = quantize(weight, method="gptq", hessian=hessian, **options)
    assert error(fed_back, weight, hessian) < error(searched, weight, hessian)


def test_a_hessian_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="hessian is not finite"):
        quantize(
            torch.ones(4, 32), bits=4, block=32, method="gptq",
            hessian=torch.full((32, 32), torch.nan),
        )  # fmt: skip
