"""The Triton bodies against the reference on shapes, strides and options that nobody picked."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptopt.kernels import attention, attention_decode, cross_entropy, ffn, layernorm, rotary
from gptopt.kernels.attention import triton_decode
from gptopt.kernels.cross_entropy import triton as cross_entropy_triton
from gptopt.kernels.ffn import triton as ffn_triton
from gptopt.kernels.ffn.reference import ACTIVATIONS, GATED

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EDGES = [1, 3, 63, 129]
HEAD_DIMS = [1, 3, 16, 24, 40, 64, 72, 80, 96, 128, 256]
dtypes = st.sampled_from(DTYPES)
leading = st.lists(st.sampled_from([1, 2, 3, 4, 2, 3, 0]), max_size=3) | st.sampled_from(EDGES).map(
    lambda n: [n]
)


@pytest.fixture(
    params=[
        pytest.param(1, id="few"),
        pytest.param(12, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ]
)
def search(request):
    """search(amount, example): run it with a `draw` of its own, on the same examples every time."""

    def run(amount, example) -> None:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
        options = settings(
            max_examples=amount * request.param,
            deadline=None,
            derandomize=True,
            suppress_health_check=checks,
        )

        def seeded(data):
            torch.manual_seed(0)
            example(data.draw)

        options(given(st.data())(seeded))()

    return run


def tensor(draw, device, *shape) -> Tensor:
    """Random float64 numbers with strides of any kind: gaps, other orders, neighbours far away."""
    x = torch.randn(shape, dtype=torch.float64, device=device)
    match draw(st.sampled_from(["plain", "plain", "gap", "swapped", "apart"])):
        case "gap":
            return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
        case "swapped" if x.ndim > 1:
            i, j = draw(st.permutations(range(x.ndim)))[:2]
            return x.transpose(i, j).contiguous().transpose(i, j)
        case "apart":
            return torch.stack((x, x), -1)[..., 0]
    return x


def dropout(draw, device) -> dict:
    p = draw(st.sampled_from([0.0, 0.0, 0.2, 0.7]))
    return {"dropout_p": p, "seed": torch.tensor(draw(st.integers(-(2**63), 2**63 - 1))).to(device)}


def scores(draw, H, S, device) -> dict:
    """The options that attention and decode share."""
    slopes = 2.0 ** -torch.arange(1.0, H + 1, device=device)
    return {
        "window": draw(st.none() | st.integers(1, S + 2)),
        "softcap": draw(st.none() | st.sampled_from([0.7, 5.0, 50.0])),
        "scale": draw(st.none() | st.sampled_from([0.3, -0.2, 0.0])),
        "alibi_slopes": draw(st.none() | st.just(slopes)),
    }


def mask(draw, B, S, device) -> Tensor | None:
    """None, padding on a side, holes, or nothing left of a row."""
    real = torch.ones(B, S, dtype=torch.bool)
    for b in range(B):
        n = draw(st.integers(0, S))
        match draw(st.sampled_from(["left", "right", "holes", "all"])):
            case "left":
                real[b, :n] = False
            case "right":
                real[b, S - n :] = False
            case "holes":
                real[b, torch.randperm(S)[:n]] = False
    return draw(st.none() | st.just(real.to(device)))


def documents(draw, B, S, device) -> Tensor | None:
    """None, documents one after the other (some numbers have no token), or in any order."""
    ids = torch.randint(-2, draw(st.integers(-1, 9)), (B, S))
    ids = ids.sort(dim=1).values if draw(st.booleans()) else ids
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64]))).to(device)
    return draw(st.none() | st.just(ids))


def heads(draw) -> tuple[int, int, int]:
    """H, K and D."""
    K, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 5)]))
    return K * group, K, draw(st.sampled_from(HEAD_DIMS))


def test_attention(device, check, search):
    def example(draw):
        H, K, D = heads(draw)
        B = draw(st.sampled_from([1, 2, 1, 2, 0])) if H < 4 else 1
        T = draw(st.sampled_from([1, 2, 3, 17, 33, *[63, 129] * (H < 3)]))
        P = draw(st.sampled_from([0, 0, 1, 5, 33]))
        options = {
            **scores(draw, H, P + T, device),
            **dropout(draw, device),
            "causal": draw(st.booleans()),
            "key_mask": mask(draw, B, P + T, device),
            "doc_ids": documents(draw, B, P + T, device),
        }

        def function(impl):
            def call(q, k, v, *past):
                found = attention(q, k, v, past=past or None, impl=impl, **options)
                return found.out, found.lse

            return call

        tensors = [tensor(draw, device, B, n, T, D) for n in (H, K, K)]
        tensors += [tensor(draw, device, B, K, P, D) for _ in range(2 if P else 0)]
        check(function("triton"), function("reference"), tensors, draw(dtypes))

    search(5, example)


def test_attention_decode(device, search, monkeypatch):
    def example(draw):
        B, (H, K, D) = draw(st.integers(1, 3)), heads(draw)
        T, M = draw(st.sampled_from([1, 1, 2, 5, 20])), draw(st.integers(20, 150))
        filled = [draw(st.integers(0, M - T)) for _ in range(B)]
        n = torch.tensor(filled, device=device).to(
            draw(st.sampled_from([torch.int32, torch.int64]))
        )
        options = scores(draw, H, M, device)
        new = [tensor(draw, device, B, m, T, D) for m in (H, K, K)]
        held = torch.randn(2, B, K, M, D, dtype=torch.float64, device=device)
        held[:, torch.arange(M, device=device) >= n[:, None, None].expand(B, K, 1)] = torch.nan
        dtype = draw(dtypes)
        if device.type == "cpu":
            sms = draw(st.sampled_from([1, 100]))
            monkeypatch.setattr(triton_decode, "sm_count", lambda device: sms)

        def run(impl, dtype, rounded=dtype):
            cache = held.to(rounded).to(dtype)
            cache = cache.nan_to_num() if impl == "reference" else cache
            out = attention_decode(
                *(x.to(rounded).to(dtype) for x in new), tuple(cache), n, impl=impl, **options
            )
            return out.double(), cache

        exact, _ = run("reference", torch.float64)
        same, expected = run("reference", dtype)
        found, cache = run("triton", dtype)
        band = torch.finfo(dtype).eps * exact.abs().max()
        assert (found - exact).abs().max() <= max(
            2 * (same - exact).abs().max() + 2 * band, 2e-5 * exact.abs().max()
        )
        written = torch.arange(M, device=device) < n[:, None, None].expand(B, K, 1) + T
        assert cache[:, written].equal(expected[:, written])
        assert cache[:, ~written].isnan().all()

    search(8, example)


def test_layernorm(device, check, search):
    def example(draw):
        C = draw(st.sampled_from([1, 3, 16, 63, 129, 768, 1000]) | st.integers(1, 300))
        shape = [*draw(leading), C]
        given = [draw(st.booleans()) for _ in range(3)]
        options = {
            **dropout(draw, device),
            "kind": draw(st.sampled_from(["layer", "rms"])),
            "eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        }
        tensors = [tensor(draw, device, *shape), *(tensor(draw, device, C) for _ in range(2))]
        tensors += [tensor(draw, device, *shape)]
        tensors = [x for x, there in zip(tensors, [True, *given], strict=True) if there]

        def function(impl):
            def call(x, *rest):
                rest = iter(rest)
                present = [next(rest) if there else None for there in given]
                return layernorm(x, *present, **options, impl=impl)

            return call

        check(function("triton"), function("reference"), tensors, draw(dtypes))

    search(12, example)


def test_ffn(device, check, search, monkeypatch):
    def example(draw):
        C = draw(st.sampled_from([1, 16, 33, 64]) | st.integers(1, 70))
        F = draw(st.sampled_from([16, 33, 64]) | st.integers(9, 70))  # few would all be near 0
        shape, activation = draw(leading), draw(st.sampled_from([*ACTIVATIONS]))
        names = ["bias", "addend", "gate_bias"] if activation in GATED else ["bias", "addend"]
        names = [name for name in names if draw(st.booleans())]
        names += ["gate_weight"] * (activation in GATED)
        sizes = {"addend": [*shape, F], "gate_weight": [F, C]}
        tensors = [tensor(draw, device, *shape, C), tensor(draw, device, F, C)]
        tensors += [tensor(draw, device, *sizes.get(name, [F])) for name in names]
        recompute = draw(st.booleans())
        monkeypatch.setattr(ffn_triton, "PROGRAMS", draw(st.sampled_from([1, 3, 2048])))

        def function(impl):
            def call(x, weight, *rest):
                given = {"bias": None, **dict(zip(names, rest, strict=True))}
                options = {"activation": activation, "recompute": recompute, "impl": impl}
                return (ffn(x, weight, **given, **options),)

            return call

        check(function("triton"), function("reference"), tensors, draw(dtypes))

    search(12, example)


def test_cross_entropy(device, check, search, monkeypatch):
    monkeypatch.setattr(cross_entropy_triton, "_TILE", 2)

    def example(draw):
        shape = draw(leading)
        C, V = draw(st.integers(1, 40)), draw(st.integers(1, 70) | st.sampled_from([128, 257]))
        targets = torch.randint(0, V, shape, device=device)
        ignored = draw(st.sampled_from([-100, 0, V + 3]))
        targets[torch.rand(shape, device=device) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = ignored
        options = {
            "targets": targets,
            "ignore_index": ignored,
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "z_loss": draw(st.sampled_from([0.0, 0.01])),
            "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
            "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        }
        monkeypatch.setattr(cross_entropy_triton, "MIN_TOKENS", draw(st.sampled_from([4, 2048])))

        def function(impl):
            return lambda *x: (cross_entropy(*x, **options, impl=impl),)

        tensors = [tensor(draw, device, *shape, C), tensor(draw, device, V, C)]
        check(function("triton"), function("reference"), tensors, draw(dtypes))

    search(12, example)


def test_rotary(device, check, search):
    def example(draw):
        B, (H, K, D) = draw(st.sampled_from([1, 2, 3, 1, 2, 0])), heads(draw)
        T, R = draw(st.sampled_from([*EDGES, 32, 0])), draw(st.integers(0, D // 2))
        angle = torch.randn(draw(st.sampled_from([1, max(B, 1)])), T, R, device=device)
        angle = draw(st.sampled_from([angle, angle.mT.contiguous().mT]))
        options = {"interleaved": draw(st.booleans())}
        function = partial(rotary_call, angle.cos(), angle.sin(), options)
        tensors = [tensor(draw, device, B, n, T, D) for n in (H, K)]
        check(function("triton"), function("reference"), tensors, draw(dtypes))

    search(10, example)


def rotary_call(cos, sin, options, impl):
    return lambda q, k: rotary(q, k, cos, sin, **options, impl=impl)
