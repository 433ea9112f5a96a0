"""attention against loops that follow its docstring one query at a time."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptopt.kernels import attention

B, H, T, D = 2, 4, 5, 8
LEFT, RIGHT, HOLES = "left", "right", "holes"
SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.125])
SEED = 2**40 + 17


def key_mask(kind: str, S: int) -> Tensor:
    """Padding of different lengths in each row; `holes` also hides everything from a row."""
    mask = torch.ones(B, S, dtype=torch.bool)
    for b, n in enumerate((1, min(3, S - 1))):
        mask[b, slice(0, n) if kind != RIGHT else slice(S - n, S)] = False
    if kind == HOLES:
        mask[0, 2:5:2] = False
        mask[1] = False
    return mask


def documents(S: int) -> Tensor:
    return torch.stack([torch.arange(S) // 3, (torch.arange(S) + 1) // 4])


def by_loops(q, k, v, *past, keeps=None, **options) -> tuple[Tensor, ...]:
    """out and lse, one query at a time, from the definition; finite in place of -inf."""
    if past:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    S, K = k.shape[2], k.shape[1]
    see = partial(sees, options=options, P=S - T, S=S)
    out, lse = [], []
    for b in range(B):
        mask = options.get("key_mask", torch.ones(B, S, dtype=torch.bool))[b].tolist()
        position = [sum(mask[: j + 1]) - 1 for j in range(S)]
        for h in range(H):
            for i in range(T):
                keys = [j for j in range(S) if see(b, i, j, mask, position)]
                row = one_query(q[b, h, i], k[b, h * K // H], v[b, h * K // H], keys)
                distances = [abs(position[S - T + i] - position[j]) for j in keys]
                kept = None
                if options.get("dropout_p"):
                    index = [(S - T + i) * 2**32 + j for j in keys]
                    p = options["dropout_p"]
                    kept = [keeps(SEED, p, n, b * H + h) / (1 - p) for n in index]
                o, s = row(distances, h, kept, options)
                out.append(o)
                lse.append(s)
    return torch.stack(out).view(B, H, T, D), torch.stack(lse).view(B, H, T)


def sees(b, i, j, mask, position, *, options, P, S) -> bool:
    if not mask[j]:
        return False
    if "doc_ids" in options and options["doc_ids"][b, P + i] != options["doc_ids"][b, j]:
        return False
    if options.get("causal", True) and j > P + i:
        return False
    if "window" in options:
        return 0 <= position[P + i] - position[j] < options["window"]
    return True


def one_query(q, k, v, keys):
    def row(distances, h, kept, options):
        if not keys:
            return q * 0, q.sum() * 0
        scores = k[keys] @ q * options.get("scale", 1 / math.sqrt(D))
        if "softcap" in options:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        if "alibi_slopes" in options:
            scores = scores - (SLOPES[h].double() * torch.tensor(distances)).to(q.dtype)
        weights = torch.softmax(scores.to(torch.promote_types(q.dtype, torch.float32)), 0)
        if kept is not None:
            weights = weights * torch.tensor(kept, dtype=weights.dtype)
        return weights.to(q.dtype) @ v[keys], scores.logsumexp(0)

    return row


def by_operator(q, k, v, *past, **options) -> tuple[Tensor, ...]:
    result = attention(q, k, v, past=past or None, **options)
    if result.lse is None:
        return (result.out,)
    return result.out, result.lse.masked_fill(result.lse == -torch.inf, 0.0)


def inputs(K: int = H, P: int = 0) -> list[Tensor]:
    shapes = [(B, H, T, D), *((B, K, T, D),) * 2, *(((B, K, P, D),) * 2 if P else ())]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


CASES = {
    "causal": {},
    "full": {"causal": False},
    "grouped": {"K": 2},
    "one key head, past": {"K": 1, "P": 3},
    "scale": {"scale": 0.7},
    "window": {"window": 2, "P": 4},
    "window 1": {"window": 1},
    "window, full": {"window": 3, "causal": False, "P": 2},
    "softcap": {"softcap": 0.8, "P": 2},
    "alibi": {"alibi_slopes": SLOPES, "P": 2},
    "alibi, full": {"alibi_slopes": SLOPES, "causal": False},
    "documents": {"doc_ids": documents, "P": 3},
    "documents, full": {"doc_ids": documents, "causal": False, "window": 2},
    "left padding": {"key_mask": LEFT, "P": 2},
    "left padding, alibi, window": {"key_mask": LEFT, "alibi_slopes": SLOPES, "window": 3, "P": 1},
    "right padding, alibi": {"key_mask": RIGHT, "alibi_slopes": SLOPES, "K": 2},
    "right padding, full": {"key_mask": RIGHT, "causal": False},
    "rows that see nothing": {"key_mask": HOLES},
    "rows that see nothing, all rules": {
        "key_mask": HOLES,
        "doc_ids": documents,
        "alibi_slopes": SLOPES,
        "window": 4,
        "softcap": 2.0,
        "K": 2,
        "P": 3,
    },
    "dropout": {"dropout_p": 0.4, "seed": torch.tensor(SEED)},
    "dropout, everything": {
        "dropout_p": 0.3,
        "seed": torch.tensor(SEED),
        "key_mask": LEFT,
        "alibi_slopes": SLOPES,
        "softcap": 3.0,
        "K": 2,
        "P": 2,
    },
}


def case(name: str) -> tuple[list[Tensor], dict]:
    options = dict(CASES[name])
    tensors = inputs(options.pop("K", H), P := options.pop("P", 0))
    if "key_mask" in options:
        options["key_mask"] = key_mask(options["key_mask"], P + T)
    if "doc_ids" in options:
        options["doc_ids"] = options["doc_ids"](P + T)
    return tensors, options


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_follow_the_definition(name, path, check, keeps):
    tensors, options = case(name)
    oracle = partial(by_loops, keeps=keeps, **options)
    check(partial(by_operator, **options), oracle, tensors, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_without_lse_the_answer_is_the_same(name, check, keeps):
    tensors, options = case(name)
    check(
        partial(by_operator, need_lse=False, **options),
        lambda *x: by_loops(*x, keeps=keeps, **options)[:1],
        tensors,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "alibi", "left padding", "softcap", "grouped"])
@pytest.mark.parametrize("need_lse", [True, False])
def test_lower_precision_stays_within_its_budget(name, dtype, need_lse, check):
    tensors, options = case(name)

    def oracle(*x):
        return by_loops(*x, **options)[: 2 if need_lse else 1]

    check(partial(by_operator, need_lse=need_lse, **options), oracle, tensors, dtype)


@pytest.mark.parametrize("need_lse", [True, False])
def test_alibi_keeps_long_distances_in_bfloat16(need_lse):
    T = 600  # bfloat16 has eight bits: 511 and 512 are one number there
    q = torch.zeros(1, 1, T, 8, dtype=torch.bfloat16)
    v = torch.eye(T, dtype=torch.bfloat16)[None, None, :, T - 599 : T - 591]
    options = {"alibi_slopes": torch.tensor([0.05]), "need_lse": need_lse}
    out = attention(q, q, v, **options).out
    wide = attention(q.double(), q.double(), v.double(), **options).out
    torch.testing.assert_close(out.double(), wide, rtol=2**-8, atol=0)


def test_a_row_that_sees_no_key_is_zero_with_lse_minus_infinity(path):
    q, k, v = (x.requires_grad_() for x in inputs())
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :2] = False  # rows 0 and 1 of batch 0 see nothing, and nobody sees keys 0 and 1
    out, _, lse = attention(q, k, v, key_mask=mask)
    assert (out[0, :, :2] == 0).all()
    assert (lse[0, :, :2] == -torch.inf).all()
    assert lse[0, :, 2:].isfinite().all()
    finite = lse[lse > -torch.inf]
    dq, dk, dv = torch.autograd.grad(out.sin().sum() + finite.sum(), (q, k, v))
    assert (dq[0, :, :2] == 0).all()
    assert (dk[0, :, :2] == 0).all()
    assert (dv[0, :, :2] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert (dq[0, :, 2:].abs().sum(-1) > 0).all()


def test_the_gradient_of_minus_infinity_is_zero(path):
    q, k, v = (x.requires_grad_() for x in inputs())
    mask = torch.zeros(B, T, dtype=torch.bool)
    lse = attention(q, k, v, key_mask=mask).lse
    dq, dk = torch.autograd.grad(lse.sum(), (q, k))
    assert (dq == 0).all()
    assert (dk == 0).all()


@pytest.mark.parametrize("name", ["causal", "softcap", "rows that see nothing", "dropout"])
def test_gradcheck(name, path):
    tensors, options = case(name)
    tensors = [x[..., :3].clone().requires_grad_() for x in tensors]

    def function(*x):
        result = attention(*x[:3], past=x[3:] or None, **options)
        return result.out, *result.present, result.lse.masked_fill(result.lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_present_is_the_past_and_the_new_tokens(path):
    q, k, v, past_k, past_v = inputs(K=2, P=3)
    out, (present_k, present_v), _ = attention(q, k, v, past=(past_k, past_v))
    assert present_k.equal(torch.cat((past_k, k), 2))
    assert present_v.equal(torch.cat((past_v, v), 2))
    first = attention(q, k, v)
    assert first.present[0] is k
    assert first.present[1] is v
    assert not first.out.allclose(out)


def test_gradients_flow_through_the_present(path):
    tensors = [x.requires_grad_() for x in inputs(K=2, P=3)]
    q, k, v, *past = tensors
    result = attention(q, k, v, past=tuple(past))
    weight = torch.randn(B, 2, 3 + T, D, dtype=torch.float64)
    (result.present[0] * weight).sum().backward()
    assert k.grad.equal(weight[:, :, 3:])
    assert past[0].grad.equal(weight[:, :, :3])
    assert v.grad is None or (v.grad == 0).all()


@pytest.mark.parametrize("chunks", [[5], [2, 3], [1] * 5, [4, 1]])
@pytest.mark.parametrize("name", ["causal", "alibi, window", "softcap", "documents", "padding"])
def test_chunks_with_a_past_say_what_the_whole_says(name, chunks):
    options = {
        "causal": {},
        "alibi, window": {"alibi_slopes": SLOPES, "window": 3},
        "softcap": {"softcap": 1.5, "dropout_p": 0.3, "seed": torch.tensor(4)},
        "documents": {"doc_ids": documents(T)},
        "padding": {"key_mask": key_mask(LEFT, T), "alibi_slopes": SLOPES},
    }[name]
    q, k, v = (x.float() for x in inputs(K=2))
    whole = attention(q, k, v, **options, need_lse=False)
    past, outs, end = None, [], 0
    for n in chunks:
        begin, end = end, end + n
        part = {
            name: x[:, :end] if name in ("key_mask", "doc_ids") else x
            for name, x in options.items()
        }
        new = (x[:, :, begin:end] for x in (q, k, v))
        out, past, _ = attention(*new, past=past, **part, need_lse=False)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole.out, rtol=1e-5, atol=1e-6)
    assert past[0].equal(k)


def test_padding_on_either_side_changes_nothing_for_real_tokens():
    q, k, v = (x.float() for x in inputs())
    options = {"alibi_slopes": SLOPES, "window": 3}
    plain = attention(q, k, v, **options).out
    for left, right in ((2, 0), (0, 3), (1, 2)):
        padded = [torch.nn.functional.pad(x, (0, 0, left, right), value=9.0) for x in (q, k, v)]
        mask = torch.zeros(B, left + T + right, dtype=torch.bool)
        mask[:, left : left + T] = True
        out = attention(*padded, key_mask=mask, **options).out[:, :, left : left + T]
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


def test_dropout_draws_the_same_mask_in_every_layout():
    q, k, v = (x.float() for x in inputs(K=2))
    options = {"dropout_p": 0.5, "seed": torch.tensor(8)}
    whole = attention(q, k, v, **options)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert attention(*strided, **options).out.allclose(whole.out, atol=1e-6)
    wide_heads = attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), **options)
    assert wide_heads.out.allclose(whole.out, atol=1e-6)
    assert not attention(q, k, v, dropout_p=0.5, seed=torch.tensor(9)).out.allclose(whole.out)
    undropped = attention(q, k, v)
    assert undropped.lse.equal(whole.lse)


def test_strided_inputs_give_the_same_numbers(path, check):
    fused = torch.randn(B, T, 3 * H * D, dtype=torch.float64)

    def split(x, contiguous):
        views = (y.view(B, T, H, D).transpose(1, 2) for y in x.chunk(3, -1))
        return by_operator(*(y.contiguous() if contiguous else y for y in views))

    check(partial(split, contiguous=False), partial(split, contiguous=True), [fused])


@pytest.mark.parametrize(
    ("shape", "P"), [((0, 4, 3, 8), 0), ((2, 4, 0, 8), 0), ((2, 4, 0, 8), 3), ((0, 4, 3, 8), 2)]
)
@pytest.mark.parametrize("need_lse", [True, False])
def test_sizes_of_zero(shape, P, need_lse, path):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    earlier = torch.randn(shape[0], shape[1], P, shape[3])
    out, present, _ = attention(q, k, v, past=(earlier, earlier) if P else None, need_lse=need_lse)
    assert out.shape == shape
    assert present[0].shape[2] == P + shape[2]
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == shape


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 9), st.integers(0, 9)),
    D=st.sampled_from([1, 3, 8, 40]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 12),
    slopes=st.booleans(),
    mask=st.none() | st.integers(0, 2**20),
)
def test_fused_and_explicit_agree_on_any_shape(sizes, D, causal, window, slopes, mask):
    B, K, G, T, P = sizes
    generator = torch.Generator().manual_seed(sum(sizes) * D)
    shapes = [(B, K * G, T, D), *((B, K, T, D),) * 2, *((B, K, P, D),) * 2]
    q, k, v, *past = (torch.randn(shape, generator=generator) for shape in shapes)
    bits = torch.arange(B * (P + T)).view(B, P + T) % 20
    options = {
        "past": tuple(past),
        "causal": causal,
        "window": window,
        "alibi_slopes": torch.rand(K * G, generator=generator) if slopes else None,
        "key_mask": None if mask is None else (mask >> bits) % 2 == 1,
    }
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=generator)
    results = []
    for need_lse in (True, False):
        out = attention(*leaves, **options, need_lse=need_lse).out
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for explicit, fused in zip(*results, strict=True):
        assert explicit.isfinite().all()
        torch.testing.assert_close(fused, explicit, rtol=1e-4, atol=2e-5)


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


Q = tensor(2, 4, 3, 8)
BAD = [
    ({"q": tensor(4, 3, 8)}, r"q is of shape \(4, 3, 8\), expected \(B, H, T, D\)"),
    ({"q": tensor(2, 4, 3, 8, dtype=torch.int32)}, "q is of dtype torch.int32"),
    ({"k": tensor(2, 4, 5, 8)}, r"k is of shape .*expected \(B, K, T, D\) = \(2, K, 3, 8\)"),
    ({"k": tensor(2, 3, 3, 8)}, "k is of 3 heads, expected a divisor of the H = 4 heads of q"),
    ({"k": tensor(2, 0, 3, 8)}, "k is of 0 heads"),
    ({"v": tensor(2, 2, 3, 8)}, r"v is of shape .*expected \(2, 4, 3, 8\) as k"),
    ({"k": Q.double()}, "k is of dtype torch.float64, expected torch.float32 as q"),
    ({"v": Q.to("meta")}, "v is on meta, expected cpu as q"),
    ({"past": (Q, Q, Q)}, r"past is a tuple of 3, expected \(keys, values\)"),
    ({"past": (tensor(2, 2, 3, 8), Q)}, "past keys is of shape"),
    ({"past": (Q, tensor(2, 4, 1, 8))}, "past values is of shape"),
    ({"past": (Q.double(), Q.double())}, "past keys is of dtype torch.float64"),
    ({"key_mask": tensor(2, 4, dtype=torch.bool)}, r"key_mask is of shape \(2, 4\).* = \(2, 3\)"),
    ({"key_mask": tensor(2, 3)}, "key_mask is of dtype torch.float32, expected torch.bool"),
    ({"doc_ids": tensor(2, 3)}, "doc_ids is of dtype torch.float32, expected torch.int64"),
    ({"doc_ids": tensor(3, dtype=torch.int64)}, r"doc_ids is of shape \(3,\)"),
    ({"window": 0}, "window is 0, expected a number of tokens of at least 1"),
    ({"softcap": 0.0}, r"softcap is 0\.0, expected a number above 0"),
    ({"softcap": math.nan}, "softcap is nan"),
    ({"alibi_slopes": tensor(3)}, r"alibi_slopes is of shape \(3,\), expected \(H,\) = \(4,\)"),
    ({"alibi_slopes": tensor(4, device="meta")}, "alibi_slopes is on meta"),
    ({"alibi_slopes": tensor(4).requires_grad_()}, "alibi_slopes is .*requires a gradient"),
    ({"dropout_p": 1.0}, r"dropout_p is 1\.0, expected 0 <= dropout_p < 1"),
    ({"dropout_p": 0.1}, "seed is None, expected a .* int64 tensor"),
    ({"impl": "fast"}, "impl is 'fast', expected 'auto', 'reference' or 'triton'"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        attention(**{"q": Q, "k": Q, "v": Q, **changed})
