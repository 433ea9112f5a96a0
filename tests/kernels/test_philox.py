"""Dropout's numbers: those of Random123 and of Triton, and a mask that depends on nothing else."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gptopt.kernels import dropout
from gptopt.kernels.philox import drop_probabilities, first_word, keep_mask, philox

WORD = 0xFFFFFFFF


def tensors(*words):
    return tuple(torch.tensor(word) for word in words)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    words = philox(tensors(*counter), tensors(*key))
    assert tuple(int(word) for word in words) == expected
    assert int(first_word(tensors(*counter), tensors(*key))) == expected[0]


def test_first_word_is_the_first_of_four_for_any_broadcast():
    def words(*shape):
        return torch.randint(0, 2**32, shape)

    for shapes in [((5,), (), (), ()), ((7,), (3, 1), (2, 4, 1, 1), ()), ((2, 3),) * 4]:
        counter = tuple(words(*shape) for shape in shapes)
        before = [word.clone() for word in counter]
        key = (words(), words())
        assert first_word(counter, key).equal(philox(counter, key)[0])
        assert all(a.equal(b) for a, b in zip(counter, before, strict=True)), "an input changed"


TRITON_PROGRAM = """
import json, torch, triton
import triton.language as tl

@triton.jit
def kernel(out, offsets, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c, d = tl.randint4x(seed, tl.load(offsets + i))
    tl.store(out + i, a); tl.store(out + N + i, b)
    tl.store(out + 2 * N + i, c); tl.store(out + 3 * N + i, d)
    low = i.to(tl.uint32)
    e, _, _, _ = tl.philox(seed, low, low * 0 + 3, low * 0 + 5, low * 0)
    tl.store(out + 4 * N + i, e)

offsets, seeds = map(torch.tensor, json.loads(%r))
out = torch.empty(2, 5, len(offsets), dtype=torch.int32)
for row, seed in zip(out, seeds.tolist()):
    kernel[(1,)](row, offsets, seed, len(offsets))
print(json.dumps((out.long() %% 2**32).tolist()))
"""


def test_numbers_are_those_of_triton(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    seeds = [2**40 + 12345, -7]
    offsets = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1, 2**40 + 3]
    program = tmp_path / "program.py"
    program.write_text(TRITON_PROGRAM % json.dumps([offsets, seeds]))
    env = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]

    index, low, zero = torch.tensor(offsets), torch.arange(len(offsets)), torch.tensor(0)
    for seed, (*words, plane) in zip(seeds, json.loads(done.stdout), strict=True):
        key = tensors(seed & WORD, (seed >> 32) & WORD)
        ours = philox((index & WORD, index >> 32, zero, zero), key)
        assert [word.tolist() for word in ours] == words
        assert first_word((low, *tensors(3, 5), zero), key).tolist() == plane


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
def test_mask_is_that_of_python_integers(keeps, seed):
    x = torch.ones(3, 5, 7)
    kept = (dropout(x, 0.3, torch.tensor(seed)) != 0).flatten().tolist()
    assert kept == [keeps(seed, 0.3, i) for i in range(x.numel())]


def test_index_beyond_32_bits_uses_the_second_word(keeps):
    index = torch.tensor([2**32 - 1, 2**32, 2**33 + 17])
    zero = torch.tensor(0)
    mask = keep_mask(torch.tensor(5), 0.5, index & WORD, index >> 32, zero)
    assert mask.tolist() == [keeps(5, 0.5, int(i)) for i in index]


def test_probabilities_have_their_place_as_index(keeps):
    p, seed, (B, H, T, S) = 0.4, 99, (2, 3, 2, 5)
    kept = drop_probabilities(torch.ones(B, H, T, S), p, torch.tensor(seed)) != 0
    for b in range(B):
        for h in range(H):
            for i in range(T):
                row = [keeps(seed, p, (S - T + i) * 2**32 + j, b * H + h) for j in range(S)]
                assert kept[b, h, i].tolist() == row


def test_dropout_keeps_the_right_share_and_the_mean():
    x = torch.ones(200, 500)
    y = dropout(x, 0.25, torch.tensor(3))
    assert abs((y == 0).double().mean().item() - 0.25) < 0.005
    assert abs(y.double().mean().item() - 1.0) < 0.01
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]


def test_mask_ignores_strides_and_dtype_and_changes_with_the_seed():
    x = torch.rand(6, 10) + 1
    seed = torch.tensor(11)
    mask = dropout(x, 0.5, seed) != 0
    assert (dropout(x.T.contiguous().T, 0.5, seed) != 0).equal(mask)
    assert (dropout(x.bfloat16(), 0.5, seed) != 0).equal(mask)
    assert not (dropout(x, 0.5, torch.tensor(12)) != 0).equal(mask)


def test_dropout_of_nothing_and_of_probability_zero():
    x = torch.rand(3)
    assert dropout(x, 0.0, None) is x
    assert dropout(torch.rand(0, 4), 0.5, torch.tensor(1)).shape == (0, 4)


def test_gradient_is_dropped_by_the_same_mask():
    x = torch.rand(4, 5, requires_grad=True)
    y = dropout(x, 0.5, torch.tensor(2))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.equal((y != 0) * 2.0)


@pytest.mark.parametrize(
    ("x", "p", "seed", "message"),
    [
        (torch.ones(2, dtype=torch.int64), 0.5, torch.tensor(1), "x is of dtype torch.int64"),
        (torch.ones(2), 1.0, torch.tensor(1), r"p is 1\.0, expected 0 <= p < 1"),
        (torch.ones(2), 0.5, None, "seed is None"),
        (torch.ones(2), 0.5, torch.tensor([1]), r"seed is torch.int64 of shape \(1,\)"),
        (torch.ones(2), 0.5, torch.tensor(1.0), "seed is torch.float32"),
        (torch.ones(2), 0.5, torch.tensor(1, device="meta"), "seed is on meta"),
    ],
)
def test_bad_arguments_are_named(x, p, seed, message):
    with pytest.raises(ValueError, match=message):
        dropout(x, p, seed)
