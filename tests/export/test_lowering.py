"""Each operator alone, with the arguments that gptopt's own GPT never combines."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from gptopt.errors import UserError
from gptopt.export import lowering
from gptopt.export.lowering import translate
from gptopt.export.passes import clean
from gptopt.export.targets import GROWING
from gptopt.export.trace import quiet
from gptopt.kernels import attention, ffn, layernorm, rotary

B, H, K, T, P, D, C, F = 2, 4, 2, 3, 5, 6, 8, 12


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def record(function, axes, *tensors):
    """The program of a function whose sizes along `axes` are free."""
    dynamic = tuple(dict.fromkeys(free, Dim.DYNAMIC) for free in axes)
    with torch.no_grad(), quiet():
        return torch.export.export(
            Function(function), tensors, dynamic_shapes=(dynamic,), strict=False
        )


def run(function, axes, *tensors):
    """What the function says in PyTorch and as a graph."""
    model = clean(translate(record(function, axes, *tensors), GROWING))
    names = [value.name for value in model.graph.inputs]
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    wanted = function(*tensors)
    found = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    return wanted, found


def assert_same(wanted, found):
    assert len(wanted) == len(found)
    for ours, theirs in zip(wanted, found, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), atol=2e-6, rtol=1e-5)


def qkv():
    return torch.randn(B, H, T, D), torch.randn(B, K, T, D), torch.randn(B, K, T, D)


QKV = ((0, 2),) * 3
CACHE = ((0, 2),) * 5
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 4, 4, 4]])
SOME = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)


def test_attention_without_cache_or_mask():
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])
    options = [
        {}, {"causal": False}, {"window": 2}, {"window": 2, "causal": False},
        {"scale": 0.3, "softcap": 1.5}, {"alibi_slopes": slopes},
        {"alibi_slopes": slopes, "causal": False},
    ]  # fmt: skip

    def function(q, k, v):
        return tuple(attention(q, k, v, **each)[0] for each in options)

    assert_same(*run(function, QKV, *qkv()))


def test_attention_returns_keys_and_values_without_a_past():
    def function(q, k, v):
        _, (keys, values), _ = attention(q * 2, k * 2, v * 2)
        return keys + 1, values + 1

    assert_same(*run(function, QKV, *qkv()))


def test_attention_gives_the_log_sum_exp_to_a_model_that_reads_it():
    def function(q, k, v, past_k, past_v, mask):
        past = (past_k, past_v)
        out, _, lse = attention(q, k, v, past=past, key_mask=mask)
        _, _, capped = attention(q, k, v, past=past, key_mask=mask, softcap=2.0, window=4)
        return out * lse[..., None], capped

    past = torch.randn(2, B, K, P, D)
    assert_same(*run(function, (*CACHE, (0, 1)), *qkv(), *past, SOME))


def test_attention_keeps_documents_apart():
    def function(q, k, v, past_k, past_v, mask, documents):
        return attention(q, k, v, past=(past_k, past_v), key_mask=mask, doc_ids=documents)[0]

    past = torch.randn(2, B, K, P, D)
    axes = (*CACHE, (0, 1), (0, 1))
    assert_same(*run(function, axes, *qkv(), *past, SOME, DOCUMENTS))


def test_attention_with_a_past_and_no_mask():
    def function(q, k, v, past_k, past_v):
        out, (keys, values), _ = attention(q, k, v, past=(past_k, past_v), window=4)
        return out, keys, values

    assert_same(*run(function, CACHE, *qkv(), *torch.randn(2, B, K, P, D)))


def test_padding_between_tokens_does_not_shift_distances():
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])

    def function(q, k, v, past_k, past_v, mask):
        return attention(
            q, k, v, past=(past_k, past_v), key_mask=mask, window=4, alibi_slopes=slopes
        )[0]

    past = torch.randn(2, B, K, P, D)
    assert_same(*run(function, (*CACHE, (0, 1)), *qkv(), *past, SOME))


def test_dropout_is_refused():
    def function(q, k, v):
        return attention(q, k, v, dropout_p=0.5, seed=torch.tensor(1))[0]

    with pytest.raises(UserError, match="dropout_p is 0") as caught:
        run(function, QKV, *qkv())
    assert "\n" not in str(caught.value)


def test_norms_with_and_without_weights():
    weight, bias = torch.randn(2, C)

    def function(x, residual):
        found = []
        for kind in ("layer", "rms"):
            found += layernorm(x, weight, bias, residual, kind=kind, eps=1e-3)
            found += layernorm(x, None, None, residual, kind=kind, eps=1e-3)
            found.append(layernorm(x, weight, None, kind=kind, eps=1e-3)[0])
        return tuple(found)

    assert_same(*run(function, ((0, 1),) * 2, torch.randn(B, T, C), torch.randn(B, T, C)))


def test_ffn_with_an_addend_and_no_bias():
    weight, gate = torch.randn(F, C) / 3, torch.randn(F, C) / 3

    def function(x, addend):
        return (
            ffn(x, weight, None, activation="relu2", addend=addend),
            ffn(x, weight, None, activation="swiglu", addend=addend, gate_weight=gate),
        )

    assert_same(*run(function, ((0, 1),) * 2, torch.randn(B, T, C), torch.randn(B, T, F)))


def test_rotary_of_some_channels_with_tables_for_one_row_or_all():
    def function(q, k, angles, shared):
        tables = (angles.cos(), angles.sin()), (shared.cos(), shared.sin())
        pairs = (rotary(q, k, *t, interleaved=i) for t in tables for i in (False, True))
        return tuple(x for pair in pairs for x in pair)

    angles = torch.randn(B, T, D // 2 - 1)
    assert_same(*run(function, ((0, 2), (0, 2), (0, 1), (1,)), *qkv()[:2], angles, angles[:1] + 1))


def test_parts_and_shapes_that_nobody_reads_are_no_trouble():
    def function(x):
        first, second, _ = x.split([3, 3, 2], dim=-1)
        flat = x.flatten(0, 1)  # (B T, C), a size without a name
        return first + second, flat.view(-1, 4).view(x.shape[1], x.shape[0], 8)

    assert_same(*run(function, ((0, 1),), torch.randn(B, T, C)))


def test_frequencies_are_those_of_pytorch_to_the_last_bit():
    """Another library's pow may round otherwise, and late positions multiply the difference."""
    held = torch.arange(0, 96, 2, dtype=torch.float32)  # becomes a buffer of the program

    def function(positions):
        even = torch.arange(0, 96, 2, dtype=torch.float32)
        return positions * (1.0 / 10007.0 ** (even / 96)), positions * 10003.0 ** (held / 96)

    wanted, found = run(function, ((0,),), torch.full((7, 1), 100000.0))
    for ours, theirs in zip(wanted, found, strict=True):
        assert np.array_equal(theirs, ours.numpy())


def test_an_empty_cache_is_reshaped_as_a_full_one():
    """A size of 0 is a size, and not what Reshape takes by itself for "as it was"."""

    def function(past):
        B, K, P, _ = past.shape
        return past.reshape(B * K, P, D), past.transpose(1, 2).reshape(B, P, K * D)

    program = record(function, ((0, 2),), torch.randn(B, K, P, D))
    proto = ir.to_proto(clean(translate(program, GROWING)))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {session.get_inputs()[0].name: np.zeros((B, K, 0, D), np.float32)})
    assert [each.shape for each in found] == [(B * K, 0, D), (B, 0, K * D)]


def plain(ids, x):
    """All that torch.onnx is trusted with as it stands."""
    steps = torch.arange(0, ids.shape[1]).to(torch.float32).unsqueeze(-1)
    angles = steps.exp2().reciprocal() * steps / 100.0 ** torch.arange(0, 8, 2)
    table = torch.stack([angles.sin(), -angles.cos()], dim=-1).reshape(-1, 8)
    first, second = torch.embedding(x, ids).split([3, 5], dim=-1)
    joined = torch.cat([second, first], dim=-1) + table.tanh()  # (B, T, C)
    q, k = joined.view(*ids.shape, 2, 4).permute(2, 0, 1, 3).unbind(0)  # (B, T, C / 2)
    mixed = (q @ k.transpose(1, 2)).softmax(-1) @ (q - k.sigmoid())
    turned = joined.transpose(0, 1).reshape(-1, 4)
    return torch.nn.functional.linear(turned, x.view(-1, 4)), mixed.select(0, 1)[1:]


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_a_program_of_whole_operations_is_not_traced_a_second_time(again, monkeypatch):
    """And says the same as if it were."""
    ids, x = torch.randint(0, 7, (B, T)), torch.randn(7, C)
    program = record(plain, ((0, 1), ()), ids, x)
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert calls == lowering._WHOLE | {torch.ops.aten.reshape.default, torch.ops.aten.to.dtype}
    traced, text = [], str(program)
    taken_apart = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram,
        "run_decompositions",
        lambda *arguments: traced.append(1) or taken_apart(*arguments),
    )
    if again:
        monkeypatch.setattr(lowering, "_WHOLE", set())
    assert_same(*run(plain, ((0, 1), ()), ids, x))
    assert len(traced) == again
    translate(program, GROWING)
    assert str(program) == text
