"""The two cache forms agree: functional past -> present, and StaticCache written in place."""

import pytest
import torch

from gptopt.kernels import StaticCache, attention, attention_decode

B, H, K, M, D = 3, 4, 2, 12, 8
SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.125])
OPTIONS = [{}, {"window": 3}, {"softcap": 0.7}, {"alibi_slopes": SLOPES, "scale": 0.5}]


def heads(T, dtype=torch.float32):
    return [torch.randn(B, n, T, D, dtype=dtype) for n in (H, K, K)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_static_cache_says_what_the_functional_past_says(options, dtype, path):
    cache = StaticCache(1, B, K, M, D, dtype=dtype)
    past = None
    for T in (4, 1, 2, 1):
        q, k, v = heads(T, dtype)
        expected, past, _ = attention(q, k, v, past=past, **options, need_lse=False)
        out = attention_decode(q, k, v, cache[0], cache.lengths, **options)
        cache.advance(T)
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(out, expected, **tolerance)
        end = int(cache.lengths[0])
        assert cache[0][0][:, :, :end].equal(past[0])
        assert cache[0][1][:, :, :end].equal(past[1])
        assert (cache[0][0][:, :, end:] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", [[0, 3, 7], [5, 5, 0]])
@pytest.mark.parametrize("T", [1, 3])
def test_each_row_has_its_own_length(options, lengths, T, path):
    cache = StaticCache(2, B, K, M, D)
    keys, values = cache[1]
    rows = []
    for b, n in enumerate(lengths):
        past = torch.randn(2, 1, K, n, D)
        keys[b, :, :n], values[b, :, :n] = past[0, 0], past[1, 0]
        rows.append((past[0], past[1]))
    keys[:, :, max(lengths) + T :] = 1e4  # stale tokens behind the row must not be seen
    cache.advance(torch.tensor(lengths))
    q, k, v = heads(T)
    out = attention_decode(q, k, v, cache[1], cache.lengths, **options)
    for b, past in enumerate(rows):
        one = (x[b : b + 1] for x in (q, k, v))
        expected = attention(*one, past=past, **options).out
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-5, atol=1e-6)
        n = lengths[b]
        assert keys[b, :, n : n + T].equal(k[b])
        assert values[b, :, n : n + T].equal(v[b])
    assert cache.lengths.tolist() == lengths, "counting is the caller's"
    assert (cache[0][0] == 0).all(), "another layer changed"


def test_layers_are_views_and_reset_forgets_the_tokens():
    cache = StaticCache(3, B, K, M, D, dtype=torch.float64)
    assert len(cache) == 3
    assert cache[2][0].shape == (B, K, M, D)
    assert cache[2][0].data_ptr() == cache[2][0].data_ptr()
    cache[1][1].fill_(1.0)
    assert (cache[1][1] == 1).all()
    cache.advance(4)
    cache.reset()
    assert cache.lengths.tolist() == [0] * B
    with pytest.raises(IndexError):
        cache[3]


def test_int32_lengths_and_strided_inputs():
    cache = StaticCache(1, B, K, M, D)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads(3))
    lengths = torch.tensor([1, 2, 0], dtype=torch.int32)
    out = attention_decode(q, k, v, cache[0], lengths)
    other = StaticCache(1, B, K, M, D)
    same = attention_decode(*(x.contiguous() for x in (q, k, v)), other[0], lengths.long())
    torch.testing.assert_close(out, same)


def test_no_gradient_is_recorded(path):
    cache = StaticCache(1, B, K, M, D)
    q, k, v = (x.requires_grad_() for x in heads(1))
    assert not attention_decode(q, k, v, cache[0], cache.lengths).requires_grad
    assert not cache[0][0].requires_grad


def test_no_new_tokens():
    cache = StaticCache(1, B, K, M, D)
    assert attention_decode(*heads(0), cache[0], cache.lengths).shape == (B, H, 0, D)


def test_a_full_row_is_an_error_not_a_write_elsewhere(path):
    cache = StaticCache(1, B, K, M, D)
    with pytest.raises(IndexError):
        attention_decode(*heads(2), cache[0], torch.tensor([0, M - 1, 0]))


def change(**changed):
    q, k, v = heads(2)
    cache = StaticCache(1, B, K, M, D)
    return {"q": q, "k": k, "v": v, "cache": cache[0], "lengths": cache.lengths, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache": StaticCache(1, B, 1, M, D)[0]}, "cache keys is of shape"),
        ({"cache": StaticCache(1, B, K, M, D, dtype=torch.float16)[0]}, "cache keys is of dtype"),
        ({"cache": (torch.zeros(B, K, M, D), torch.zeros(B, K, 4, D))}, "cache values is of shape"),
        ({"cache": StaticCache(1, B, K, 1, D)[0]}, "q is of 2 tokens, expected at most M = 1"),
        ({"lengths": torch.zeros(B)}, "lengths is of dtype torch.float32"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, r"lengths is of shape \(2,\)"),
        ({"lengths": torch.zeros(B, dtype=torch.int64, device="meta")}, "lengths is on meta"),
        ({"window": -1}, "window is -1"),
        ({"v": torch.zeros(B, K, 3, D)}, "v is of shape"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        attention_decode(**change(**changed))


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match=r"StaticCache sizes are \(1, 0, 2, 3, 4\)"):
        StaticCache(1, 0, 2, 3, 4)
