"""The Triton attention against the reference body: results, gradients, every option, odd shapes."""

import itertools

import pytest
import torch

from gptopt.kernels import KernelUnavailable, attention
from gptopt.kernels.attention import reference
from gptopt.kernels.attention.triton_scores import Masks
from gptopt.kernels.philox import drop_probabilities

B, H = 2, 4
SEED = 2**40 + 17
SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.125])
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def padding(kind, S):
    """Padding of different lengths in each row; `holes` also hides everything from a row."""
    mask = torch.ones(B, S, dtype=torch.bool)
    for b, n in enumerate((3, min(S // 2, 37))):
        mask[b, slice(0, n) if kind == "left" else slice(S - n, S)] = False
    if kind == "holes":
        mask[0, 5::3] = False
        mask[1] = False
    return mask


def packed(S):
    """Documents one after the other, and (in the second row) numbers that come back."""
    return torch.stack([torch.arange(S) // 13, torch.arange(S) // 5 % 3])


def heads(T, P=0, K=2, D=16, H=H, B=B):
    """q, k, v and, with P, the past, float64."""
    shapes = [(B, H, T, D), *((B, K, T, D),) * 2, *(((B, K, P, D),) * 2 if P else ())]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def both(device, S, mask=None, documents=False, dropout=0.0, **options):
    """The operator by its Triton body and by its reference body, as functions of its tensors."""
    if mask is not None:
        options["key_mask"] = padding(mask, S).to(device)
    if documents:
        options["doc_ids"] = packed(S).to(device)
    if dropout:
        options |= {"dropout_p": dropout, "seed": torch.tensor(SEED, device=device)}
    if "alibi_slopes" in options:
        options["alibi_slopes"] = SLOPES.to(device)

    def function(impl):
        def call(q, k, v, *past):
            result = attention(q, k, v, past=past or None, impl=impl, **options)
            return result.out, result.lse

        return call

    return function("triton"), function("reference")


def compare(check, device, tensors, dtype=FP32, **options):
    S = tensors[1].shape[2] + (tensors[3].shape[2] if len(tensors) > 3 else 0)
    check(*both(device, S, **options), [x.to(device) for x in tensors], dtype)


ALIBI = {"alibi_slopes": SLOPES}
EVERYTHING = {"mask": "left", "documents": True, "window": 19, "softcap": 2.0, **ALIBI}
CASES = {
    "window": ({"window": 7}, FP16),
    "window of a block, full": ({"window": 32, "causal": False}, BF16),
    "window 1": ({"window": 1}, FP32),
    "window past all": ({"window": 1000}, BF16),
    "softcap": ({"softcap": 0.8}, FP16),
    "softcap, full": ({"softcap": 30.0, "causal": False}, FP32),
    "alibi": (ALIBI, BF16),
    "alibi, full": ({"causal": False, **ALIBI}, FP16),
    "left padding": ({"mask": "left"}, FP16),
    "right padding, full": ({"mask": "right", "causal": False}, BF16),
    "holes": ({"mask": "holes"}, FP32),
    "holes, window, alibi": ({"mask": "holes", "window": 6, **ALIBI}, FP16),
    "documents": ({"documents": True}, BF16),
    "documents, full": ({"documents": True, "causal": False}, FP32),
    "documents, window": ({"documents": True, "window": 9, "causal": False}, FP16),
    "dropout": ({"dropout": 0.3}, BF16),
    "dropout, full": ({"dropout": 0.6, "causal": False}, FP16),
    "scale below 0": ({"scale": -0.4}, FP32),
    "scale 0": ({"scale": 0.0}, FP16),
    "all": ({"dropout": 0.2, **EVERYTHING}, FP32),
    "all, half": (EVERYTHING, FP16),
}


@pytest.mark.parametrize("name", CASES)
def test_every_option(device, check, name):
    options, dtype = CASES[name]
    compare(check, device, heads(45, P=22), dtype, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("name", CASES)
def test_every_option_in_every_dtype(device, check, name, dtype):
    compare(check, device, heads(70, P=60, D=40), dtype, **CASES[name][0])


@pytest.mark.parametrize(
    ("T", "P", "causal", "dtype"),
    [
        (1, 0, True, FP32),
        (3, 0, False, BF16),
        (63, 0, True, FP16),
        (129, 0, True, FP32),
        (129, 0, False, BF16),
        (1, 62, True, FP16),
        (3, 126, False, FP32),
        (64, 65, True, BF16),
        (32, 32, True, FP32),
    ],
)
def test_lengths(device, check, T, P, causal, dtype):
    compare(check, device, heads(T, P, H=2, B=1, K=1), dtype, causal=causal)


@pytest.mark.parametrize(
    ("D", "dtype"),
    [(1, FP32), (8, BF16), (40, FP32), (64, FP16), (72, BF16), (80, FP16), (96, FP32)],
)
def test_head_sizes(device, check, D, dtype):
    compare(check, device, heads(35, D=D, H=2, B=1, K=1), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("D", [16, 32, 128, 160, 256])
def test_more_head_sizes(device, check, D, dtype):
    compare(check, device, heads(40, P=9, D=D, H=2, B=1, K=1), dtype)


@pytest.mark.parametrize(("H", "K", "dtype"), [(4, 4, FP16), (4, 1, BF16), (6, 2, FP32)])
def test_groups_of_query_heads(device, check, H, K, dtype):
    compare(check, device, heads(34, P=3, H=H, K=K), dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_views_of_a_fused_projection(device, check, dtype):
    fused = torch.randn(B, 40, 3, H, 16, dtype=torch.float64, device=device)
    tensors = [x.transpose(1, 2) for x in fused.unbind(2)]
    check(*both(device, 40), tensors, dtype)
    other = [x[..., ::2] for x in heads(33, D=16)]  # the channels are no neighbours
    compare(check, device, other, dtype)


def test_strides_change_no_bit(device, deterministic):
    q, k, v = (x.float().to(device) for x in heads(41, K=4))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    with deterministic(True):
        plain = _bits(attention, (q, k, v), impl="triton")
        others = _bits(attention, strided, impl="triton")
    assert all(a.equal(b) for a, b in zip(plain, others, strict=True))


def _bits(function, tensors, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, _, lse = function(*leaves, **options)
    return out, lse, *torch.autograd.grad(out.sin().sum() + lse.sum(), leaves)


@pytest.mark.parametrize("options", [{}, {"documents": True, "dropout": 0.2}])
def test_the_same_bits_every_time(device, deterministic, options):
    tensors = [x.half().to(device) for x in heads(40)]
    triton, _ = both(device, 40, **options)

    def function(*leaves):
        out, lse = triton(*leaves)
        return out, None, lse

    with deterministic(True):
        first, second = _bits(function, tensors), _bits(function, tensors)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("only", ["out", "lse"])
def test_a_gradient_of_one_result(device, check, only):
    def one(function):
        return lambda *x: (function(*x)[only == "lse"],)

    functions = both(device, 40, mask="left")
    check(*map(one, functions), [x.to(device) for x in heads(40)])


def test_a_row_that_sees_no_key(device):
    q, k, v = (x.float().to(device).requires_grad_() for x in heads(40))
    mask = torch.ones(B, 40, dtype=torch.bool, device=device)
    mask[0, :35] = False  # rows 0 .. 34 see nothing: a whole block of them and a part
    out, _, lse = attention(q, k, v, key_mask=mask, impl="triton")
    assert (out[0, :, :35] == 0).all()
    assert (lse[0, :, :35] == -torch.inf).all()
    assert lse[0, :, 35:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k, v))
    assert (dq[0, :, :35] == 0).all()
    assert (dk[0, :, :35] == 0).all()
    assert (dv[0, :, :35] == 0).all()
    assert (dq[0, :, 35:].abs().sum(-1) > 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_a_mask_that_hides_everything(device):
    q, k, v = (x.float().to(device).requires_grad_() for x in heads(33))
    mask = torch.zeros(B, 33, dtype=torch.bool, device=device)
    out, _, lse = attention(q, k, v, key_mask=mask, window=3, causal=False, impl="triton")
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("P", [0, 7])
def test_dropout_draws_the_mask_of_the_reference(device, P):
    T, S = 40 - P, 40
    q = torch.zeros(B, H, T, S, device=device)
    k = torch.zeros(B, H, T, S, device=device)
    v = torch.eye(S, device=device).expand(B, H, S, S)  # so that out is the probabilities
    past = (torch.zeros(B, H, P, S, device=device), v[:, :, :P]) if P else None
    seed = torch.tensor(SEED, device=device)
    options = {"past": past, "causal": False, "dropout_p": 0.37, "seed": seed, "impl": "triton"}
    out = attention(q, k, v[:, :, P:], **options).out
    expected = drop_probabilities(torch.full((B, H, T, S), 1 / S, device=device), 0.37, seed)
    assert (out == 0).equal(expected == 0)
    torch.testing.assert_close(out, expected)
    assert not out.equal(attention(q, k, v[:, :, P:], **{**options, "seed": seed + 1}).out)


def test_the_present_is_the_past_and_the_new_tokens(device):
    q, k, v, past_k, past_v = (x.float().to(device) for x in heads(5, P=3))
    _, present, _ = attention(q, k, v, past=(past_k, past_v), impl="triton")
    assert present[0].equal(torch.cat((past_k, k), 2))
    assert present[1].equal(torch.cat((past_v, v), 2))
    assert attention(q, k, v, impl="triton").present[0] is k


def tiles(S, T, causal, window, mask, documents, own, other, by_key):
    """Per pair of blocks whether (some, all) of its queries and keys see each other: (B, i, j)."""
    see = torch.ones(B, T, S, dtype=torch.bool)
    distance = reference.distances(T, S, mask, torch.device("cpu"))
    visible = reference.visible(distance, causal, window)
    see = see if visible is None else see & visible
    if mask is not None:
        see = see & mask[:, None, :]
    if documents is not None:
        see = see & (documents[:, S - T :, None] == documents[:, None, :])
    see = see.transpose(1, 2) if by_key else see
    rows = see.split(own, 1)
    blocks = [row.split(other, 2) for row in rows]
    some = torch.stack([torch.stack([t.flatten(1).any(1) for t in r], 1) for r in blocks], 1)
    every = torch.stack(
        [
            torch.stack([t.flatten(1).all(1) & (t[0].numel() == own * other) for t in r], 1)
            for r in blocks
        ],
        1,
    )
    return some, every


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize(
    ("masked", "documents", "window", "causal"),
    [
        ("left", False, None, True),
        ("right", False, 20, True),
        ("holes", True, None, False),
        (None, True, None, True),
        (None, True, 9, False),
        ("left", True, 30, True),
    ],
)
def test_bounds_cover_all_that_is_seen(device, by_key, masked, documents, window, causal):
    S, T, own, other = 150, 133, 16, 8
    mask = None if masked is None else padding(masked, S)
    ids = packed(S) if documents else None
    if documents:
        ids[0] = torch.arange(S) // 40  # whole blocks within one document
    on = [None if x is None else x.to(device) for x in (mask, ids)]
    masks = Masks(*on, window, None, None, 1.0, S)
    x = torch.empty(B, 1, T, 16, device=device)
    bounds = masks.bounds(x, T, S, causal, own, other, by_key).cpu()
    some, every = tiles(S, T, causal, window, mask, ids, own, other, by_key)
    for b, i in itertools.product(range(B), range(some.shape[1])):
        start, stop, full_start, full_stop = bounds[b, i].tolist()
        length = T if by_key else S
        assert 0 <= start <= stop <= length
        seen = some[b, i].nonzero().flatten().tolist()
        if seen:
            assert start <= seen[0] * other
            assert min((seen[-1] + 1) * other, length) <= stop
        if full_stop > full_start:
            assert start <= full_start
            assert full_stop <= stop
            assert full_start % other == full_stop % other == 0
            assert every[b, i, full_start // other : full_stop // other].all()
    exact = documents and masked is None and window is None
    if exact:  # documents in a row: nothing is visited in vain, and whole blocks need no mask
        visited = (bounds[0, :, 1] - bounds[0, :, 0] + other - 1) // other
        assert visited.tolist() == some[0].sum(1).tolist()
        assert (bounds[0, :, 3] - bounds[0, :, 2]).sum() == every[0].sum() * other


@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (2, 2, 0, 16)])
def test_nothing_to_do(device, shape):
    q, k, v = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(3))
    out, _, lse = attention(q, k, v, impl="triton")
    assert out.shape == shape
    assert lse.shape == shape[:3]
    assert all(x.shape == shape for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"dtype": torch.float64}, "float64 has no kernel"), ({"D": 257}, "heads of 257 channels")],
)
def test_what_has_no_kernel_says_so_and_runs_the_reference(device, changed, message):
    shape = (1, 2, 3, changed.get("D", 16))
    dtype = changed.get("dtype", FP32)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    with pytest.raises(KernelUnavailable, match=message):
        attention(q, k, v, impl="triton")
    arguments = (q, k, v, *(None,) * 6, True, None, None, 0.25, 0.0)
    out, _, _, lse = torch.ops.gptopt.attention.default(*arguments)
    expected = attention(q, k, v, scale=0.25, impl="reference")
    assert out.equal(expected.out)
    assert lse.equal(expected.lse)
