"""Compiled with the reference body an operator is plain PyTorch, with no break in the graph."""

from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from gptopt.kernels import attention, cross_entropy, dropout, ffn, layernorm, rotary, select

SEED = torch.tensor(9)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(x, weight, up, table, targets, mask, p=0.25):
    """Every operator, with options that reach every branch a model uses."""
    y, h = layernorm(x, weight, None, x, dropout_p=p, seed=SEED)
    q = y.view(*y.shape[:2], 2, -1).transpose(1, 2)
    q, k = rotary(q, q, table, table)
    a = attention(q, k, k, need_lse=False).out
    a = a + attention(q, k, k, key_mask=mask, window=2, alibi_slopes=torch.ones(2)).out
    a = a + attention(q, k, k, dropout_p=p, seed=SEED, softcap=3.0, need_lse=False).out
    hidden = ffn(dropout(a.transpose(1, 2).flatten(2), p, SEED), up, None, activation="relu2")
    y, _ = layernorm(linear(hidden, up.T), weight, None, h, kind="rms")
    return cross_entropy(y, up, targets, z_loss=0.01, label_smoothing=0.1)


def arguments(T=3):
    x, weight, up = torch.randn(2, T, 8), torch.randn(8), torch.randn(12, 8)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[0, 0] = False
    leaves = [t.requires_grad_() for t in (x, weight, up)]
    return *leaves, torch.randn(1, T, 2), torch.randint(0, 12, (2, T)), mask


def test_the_traced_graph_has_no_operator_of_ours(monkeypatch):
    monkeypatch.setattr(select, "_told", set())  # not even the message may break the graph
    targets = []

    def backend(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    example = arguments()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*example), step(*example))
    assert len(targets) > 50
    assert not any("gptopt" in target for target in targets)


def test_compiled_loss_and_gradients_are_those_of_eager():
    example = arguments()
    losses = torch.compile(step, fullgraph=True, backend="aot_eager")(*example), step(*example)
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, example[:3]) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_length_left_free_is_compiled_once():
    count = 0

    def backend(graph, example_inputs):
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(partial(step, p=0.0), fullgraph=True, backend=backend)
    for T in (3, 5, 4):
        example = arguments(T)
        x, _, _, table, targets, mask = example
        for tensor in (x, table, targets, mask):
            torch._dynamo.mark_dynamic(tensor, 1)
        torch.testing.assert_close(compiled(*example), step(*example, p=0.0))
    assert count == 1


def test_compiles_under_autocast():
    example = arguments()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*example), step(*example))


def test_the_registered_operators_compile_without_a_break():
    ops = torch.ops.gptopt

    def through_operators(x, weight, up, targets):
        y, _ = ops.layernorm(x, weight, None, None, None, "layer", 1e-5, 0.0)
        q = y.view(*y.shape[:2], 2, -1).transpose(1, 2)
        q, k = ops.rotary(q, q, torch.ones(1, 3, 2), torch.ones(1, 3, 2), False)
        out, *_ = ops.attention(q, k, k, *(None,) * 6, True, None, None, 0.5, 0.0)
        hidden = ops.ffn(out.transpose(1, 2).flatten(2), up, None, None, None, None, "gelu")
        return ops.cross_entropy(linear(hidden, up.T), up, targets, -100, 0.0, 0.0, None, "mean")

    x, weight, up, _, targets, _ = arguments()
    leaves = (x, weight, up)
    compiled = torch.compile(through_operators, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, through_operators):
        loss = function(*leaves, targets)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
