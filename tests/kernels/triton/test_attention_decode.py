"""The Triton decode against functional attention: rows of their own lengths, written in place."""

import pytest
import torch

from gptopt.kernels import KernelUnavailable, StaticCache, attention, attention_decode
from gptopt.kernels.attention import triton_decode

SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.125])
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
B, H = 2, 4

# T new tokens, K key heads, D channels, M slots, tokens in each row, options, dtype
CASES = [
    (1, 2, 16, 90, (0, 89), {}, FP32),
    (1, 4, 40, 90, (33, 7), {}, BF16),
    (1, 1, 64, 200, (150, 31), {"softcap": 0.8}, FP16),
    (2, 2, 16, 80, (78, 16), {"alibi_slopes": SLOPES}, FP32),
    (3, 1, 16, 64, (0, 61), {"window": 5}, FP16),
    (8, 2, 80, 70, (62, 20), {"scale": -0.3}, FP32),
    (5, 1, 16, 40, (35, 3), {"window": 1}, BF16),
    (1, 2, 16, 140, (139, 64), {"window": 70, "softcap": 2.0, "alibi_slopes": SLOPES}, FP32),
    (20, 1, 16, 60, (40, 1), {}, FP32),  # more rows than a tile holds
]


def filled(T, K, D, M, lengths, dtype, device):
    """q, k, v, a cache with NaN behind each row's tokens, and the lengths."""
    cache = StaticCache(2, B, K, M, D, dtype=dtype, device=device)
    keys, values = cache[1]
    for b, n in enumerate(lengths):
        for x in (keys, values):
            x[b] = torch.nan
            x[b, :, :n] = torch.randn(K, n, D)
    cache.advance(torch.tensor(lengths, device=device))
    q, k, v = (torch.randn(B, n, T, D).to(device, dtype) for n in (H, K, K))
    return q, k, v, cache


@pytest.mark.parametrize("sms", [1, 64], ids=["whole", "split"])
@pytest.mark.parametrize(("T", "K", "D", "M", "lengths", "options", "dtype"), CASES)
def test_each_row_says_what_functional_attention_says(
    device, monkeypatch, T, K, D, M, lengths, options, dtype, sms
):
    if device.type == "cpu":
        monkeypatch.setattr(triton_decode, "sm_count", lambda device: sms)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    q, k, v, cache = filled(T, K, D, M, lengths, dtype, device)
    keys, values = cache[1]
    before = [x.clone() for x in (keys, values)]
    out = attention_decode(q, k, v, cache[1], cache.lengths, **options, impl="triton")
    assert out.dtype == dtype
    for b, n in enumerate(lengths):
        one = [x[b : b + 1] for x in (q, k, v)]
        past = tuple(x[b : b + 1, :, :n] for x in before)
        same = attention(*one, past=past, **options, impl="reference").out.double()
        wide = [x.double() for x in one]
        exact = attention(
            *wide, past=tuple(x.double() for x in past), **options, impl="reference"
        ).out
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        budget = 2 * (same - exact).abs().max() + 2 * rounding
        assert (out[b : b + 1].double() - exact).abs().max() <= budget
        for x, new, old in zip((keys, values), (k, v), before, strict=True):
            assert x[b, :, :n].equal(old[b, :, :n])
            assert x[b, :, n : n + T].equal(new[b])
            assert x[b, :, n + T :].isnan().all()
    assert (cache[0][0] == 0).all(), "another layer changed"
    assert cache.lengths.tolist() == list(lengths), "counting is the caller's"


def test_step_by_step_is_one_call_of_attention(device):
    K, D, M = 2, 16, 24
    q, k, v = (torch.randn(B, n, 10, D, device=device) for n in (H, K, K))
    expected = attention(q, k, v, impl="reference").out
    cache = StaticCache(1, B, K, M, D, device=device)
    found, n = [], 0
    for T in (4, 1, 3, 1, 1):
        new = (x[:, :, n : n + T] for x in (q, k, v))  # views: strided
        found.append(attention_decode(*new, cache[0], cache.lengths, impl="triton"))
        cache.advance(T)
        n += T
    torch.testing.assert_close(torch.cat(found, 2), expected, rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time_and_int32_lengths(device):
    q, k, v, cache = filled(2, 2, 16, 90, (50, 21), FP16, device)
    first = attention_decode(q, k, v, cache[1], cache.lengths, impl="triton")
    second = attention_decode(q, k, v, cache[1], cache.lengths.int(), impl="triton")
    assert first.equal(second)


def test_a_full_row_is_an_error_and_writes_nothing(device):
    if device.type != "cpu":
        pytest.skip("only where triton interprets")  # elsewhere no kernel runs after it
    q, k, v, cache = filled(2, 2, 16, 12, (11, 0), FP32, device)
    before = cache[1][0].clone()
    with pytest.raises(IndexError, match="cache of 12"):
        attention_decode(q, k, v, cache[1], cache.lengths, impl="triton")
    assert cache[1][0].nan_to_num().equal(before.nan_to_num())


def test_no_new_tokens(device):
    q, k, v, cache = filled(0, 2, 16, 12, (3, 0), FP32, device)
    out = attention_decode(q, k, v, cache[1], cache.lengths, impl="triton")
    assert out.shape == (B, H, 0, 16)


def test_what_has_no_kernel_says_so(device):
    q, k, v, cache = filled(1, 2, 16, 12, (3, 0), torch.float64, device)
    with pytest.raises(KernelUnavailable, match="float64 has no kernel"):
        attention_decode(q, k, v, cache[1], cache.lengths, impl="triton")
    q, k, v, cache = filled(1, 2, 16, 12, (3, 0), FP32, device)
    turned = tuple(x.mT.contiguous().mT for x in cache[1])
    with pytest.raises(KernelUnavailable, match="channels are not neighbours"):
        attention_decode(q, k, v, turned, cache.lengths, impl="triton")


@pytest.mark.parametrize(("programs", "M", "expected"), [(1, 4096, 32), (1, 200, 2), (300, 9, 1)])
def test_splits_fill_the_chip_but_no_part_is_tiny(programs, M, expected):
    assert triton_decode.splits_of(programs, M, 64, 132) == expected
    assert triton_decode.splits_of(programs, 10**6, 64, 132) <= triton_decode.MAX_SPLITS
