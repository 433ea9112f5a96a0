"""Dropout from a counter, not from a state: every body of an operator draws the same mask.

The generator is Philox 4x32 with 10 rounds, written in int64 arithmetic so that it runs on any
device and gives the integers of Triton's `tl.philox` and of Random123 bit for bit. A number depends
on (seed, position) alone: a mask is never stored, only drawn again.

    key      = (low 32 bits, high 32 bits) of the seed
    counter  = (low 32 bits, high 32 bits) of the element's linear index, plane, 0
    kept iff   first output word >= round(p * 2^32)

A tensor's elements have their row-major index, whatever their strides, and plane 0. An attention
probability has index (P + i) * 2^32 + j in plane b * H + h, so the mask is the same however the
tokens are cut into chunks. One seed gives one stream: give every call a seed of its own.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3.
"""

import torch
from torch import Tensor

from gptopt.kernels.checks import check_float, check_seed, wrong

ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Key = tuple[Tensor, Tensor]


def philox(counter: Words, key: Key) -> Words:
    """The four output words of each counter.

    Words are int64 in [0, 2^32); all arguments broadcast.
    """
    words = counter
    for round_key in _round_keys(key):
        words = _round(words, round_key)
    c0, c1, c2, c3 = words
    return c0, c1 & _WORD, c2, c3 & _WORD


def first_word(counter: Words, key: Key) -> Tensor:
    """The first word of `philox`, at a third of its time: it works in place where it can."""
    keys = _round_keys(key)
    words = _round(_round(counter, keys[0]), keys[1])  # small until the words mix
    mixed: tuple[Tensor, ...] = torch.broadcast_tensors(*words)
    c0, c1, c2, c3 = (word.contiguous() for word in mixed)
    high = torch.empty_like(c0)
    for k0, k1 in keys[2:]:
        c0.mul_(_MULTIPLIERS[0])
        c2.mul_(_MULTIPLIERS[1])
        torch.bitwise_right_shift(c2, 32, out=high)
        c1.bitwise_xor_(high).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(c0, 32, out=high)
        c3.bitwise_xor_(high).bitwise_xor_(k1).bitwise_and_(_WORD)
        c0, c1, c2, c3 = c1, c2, c3, c0
    return c0


def _round(words: Words, key: Key) -> Words:
    """One round, whose second and fourth word keep what lies above their 32 bits.

    The product of two 32-bit words wraps in int64, but its 64 bits are the right ones. The lower
    32 are the second or fourth word; only a xor reads them, and its result is cut to 32 bits.
    """
    c0, c1, c2, c3 = words
    p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
    return ((p1 >> 32) ^ c1 ^ key[0]) & _WORD, p1, ((p0 >> 32) ^ c3 ^ key[1]) & _WORD, p0


def _round_keys(key: Key) -> list[Key]:
    rounds = torch.arange(ROUNDS, device=key[0].device)
    keys = [(k + rounds * step) & _WORD for k, step in zip(key, _KEY_STEPS, strict=True)]
    return list(zip(*(k.unbind() for k in keys), strict=True))


def keep_mask(seed: Tensor, p: float, low: Tensor, high: Tensor, plane: Tensor) -> Tensor:
    """True where an element survives dropout with probability `p`.

    `seed` is () int64; `low` and `high` (the index's 32-bit words) and `plane` are int64; all
    broadcast.
    """
    key = (seed & _WORD, (seed >> 32) & _WORD)
    return first_word((low, high, plane, torch.zeros_like(seed)), key) >= round(p * 2**32)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zero each element of `x` with probability `p` and scale the others by 1 / (1 - p).

    Args:
        x: any shape, float32, bfloat16, float16 or float64. The mask belongs to the elements'
            row-major order: strides do not change it. Differentiable.
        p: 0 <= p < 1; 0 returns `x` itself.
        seed: () int64 tensor on the device of `x`; None is allowed where p is 0.

    Raises:
        ValueError: a wrong dtype, probability or seed.

    Source: Srivastava et al. 2014, "Dropout", section 4; the mask as this module's docstring says.
    """
    check_float("x", x)
    if not 0.0 <= p < 1.0:
        raise wrong("p", p, "0 <= p < 1")
    if p == 0.0:
        return x
    check_seed(seed, x)
    assert seed is not None
    return drop(x, p, seed)


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`dropout` without its checks, for the reference bodies."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    zero = torch.zeros_like(seed)
    small = x.numel() <= 2**32
    keep = keep_mask(seed, p, index & _WORD, zero if small else index >> 32, zero)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def drop_probabilities(probabilities: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout of attention probabilities (B, H, T, S), their queries the last T of S positions."""
    B, H, T, S = probabilities.shape
    position = torch.arange(S, device=probabilities.device)
    plane = torch.arange(B * H, device=probabilities.device).view(B, H, 1, 1)
    keep = keep_mask(seed, p, position, position[S - T :, None], plane)
    return torch.where(keep, probabilities * (1.0 / (1.0 - p)), 0.0)
