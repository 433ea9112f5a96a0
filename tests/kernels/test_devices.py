"""No body makes a tensor on another device than its arguments': seen on one that holds no data."""

import pytest
import torch

from gptopt.kernels import (
    StaticCache,
    attention,
    cross_entropy,
    dropout,
    ffn,
    layernorm,
    library,
    rotary,
)
from gptopt.kernels import attention_decode as decode

B, H, K, T, P, D, C, F, V = 2, 4, 2, 3, 2, 8, 6, 10, 12


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


SEED = torch.empty((), dtype=torch.int64, device="meta")


@pytest.mark.parametrize("need_lse", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attention(need_lse, p, path):
    q, k, past = meta(B, H, T, D), meta(B, K, T, D), meta(B, K, P, D)
    result = attention(
        q,
        k,
        k,
        past=(past, past),
        key_mask=meta(B, P + T, dtype=torch.bool),
        doc_ids=meta(B, P + T, dtype=torch.int64),
        alibi_slopes=torch.empty(H, device="meta"),
        window=4,
        dropout_p=p,
        seed=SEED,
        need_lse=need_lse,
    )
    assert result.out.shape == q.shape
    assert result.present[0].shape == (B, K, P + T, D)
    assert result.lse is None or result.lse.shape == (B, H, T)
    result.out.sum().backward()
    assert q.grad is not None
    assert q.grad.device.type == "meta"


def test_attention_decode(path):
    cache = StaticCache(1, B, K, 9, D, device="meta")
    q, k = meta(B, H, T, D), meta(B, K, T, D)
    out = decode(q, k, k, cache[0], cache.lengths, alibi_slopes=torch.empty(H, device="meta"))
    assert out.shape == q.shape
    assert out.device.type == "meta"


def test_a_kernel_that_cannot_run_here_is_in_nobodys_way(monkeypatch):
    """Where there is no GPU, kernels are imported to be compiled for one."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setitem(library._BODIES, "rotary", None)
    library._plain_keys.cache_clear()
    q, k, table = torch.randn(B, H, T, D), torch.randn(B, K, T, D), torch.randn(1, T, 3)
    assert rotary(q, k, table, table)[0].shape == q.shape


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_other_operators(kind, path):
    x, weight, gate = meta(B, T, C), meta(F, C), meta(F, C)
    y, h = layernorm(x, meta(C), meta(C), x, kind=kind, dropout_p=0.1, seed=SEED)
    hidden = ffn(y, weight, None, activation="swiglu", gate_weight=gate)
    assert hidden.shape == (B, T, F)
    loss = cross_entropy(h, meta(V, C), meta(B, T, dtype=torch.int64), z_loss=0.1)
    table = torch.empty(1, T, 3, device="meta")
    q, k = rotary(meta(B, H, T, D), meta(B, K, T, D), table, table)
    total = hidden.sum() + loss + q.sum() + k.sum() + dropout(y, 0.5, SEED).sum()
    total.backward()
    assert total.device.type == x.grad.device.type == "meta"
