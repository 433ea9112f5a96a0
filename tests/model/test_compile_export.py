"""The model under torch.compile in one graph, and under torch.export with its operators whole."""

import pytest
import torch

MIXES = {
    "gpt2": {},
    "llama": {
        "position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
        "n_kv_head": 2, "tie_head": False,
    },
    "alibi": {
        "position": "alibi", "norm_position": "post", "window": 3, "attn_softcap": 4.0,
        "activation": "relu2", "n_kv_head": 1,
    },
    "sinusoidal": {
        "position": "sinusoidal", "norm_position": "sandwich", "qk_norm": True,
        "activation": "geglu", "logit_softcap": 3.0,
    },
    "none": {"position": "none", "activation": "relu"},
}  # fmt: skip


@pytest.fixture(params=MIXES)
def mix(request):
    return MIXES[request.param]


def ids_of(B, T):
    return torch.randint(96, (B, T), generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi"])
def test_compiles_in_one_graph_with_equal_gradients(build, name):
    mix = MIXES[name]
    torch._dynamo.reset()
    model, twin = (build(n_layer=1, dropout=0.1, **mix).train() for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, seed = ids_of(2, 7), torch.tensor(3)
    targets = ids.roll(-1, dims=1)
    loss = compiled(ids, targets, seed=seed).loss
    expected = twin(ids, targets, seed=seed).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def export(model):
    """As the exporter does it: prefill and decode in one graph, every length free."""
    dim = torch.export.Dim
    batch, sequence, past = dim("batch"), dim("sequence"), dim("past")
    total = dim("total", min=4)
    K, D = model.config.kv_heads, model.config.head_size
    cache = [(torch.randn(2, K, 4, D), torch.randn(2, K, 4, D)) for _ in range(2)]
    mask = torch.ones(2, 7, dtype=torch.long)
    positions = torch.arange(4, 7).repeat(2, 1)
    shapes = {
        "ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: total},
        "position_ids": {0: batch, 1: sequence},
        "past": [({0: batch, 2: past}, {0: batch, 2: past}) for _ in range(2)],
        "use_cache": None,
    }
    arguments = {
        "attention_mask": mask, "position_ids": positions, "past": cache, "use_cache": True,
    }  # fmt: skip
    return torch.export.export(
        model, (ids_of(2, 3),), arguments, dynamic_shapes=shapes,
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip


def test_exports_whole_operators_with_free_lengths(build, mix):
    model = build(dtype=torch.float32, **mix)
    program = export(model)
    names = [str(node.target) for node in program.graph.nodes if "gptopt" in str(node.target)]
    count = {op: sum(f"gptopt.{op}." in name for name in names) for op in
             ("attention", "layernorm", "ffn", "rotary")}  # fmt: skip
    norms = {"pre": 5, "post": 4, "sandwich": 9}[model.config.norm_position]
    assert count["attention"] == count["ffn"] == 2
    assert count["layernorm"] == norms + (4 if model.config.qk_norm else 0)
    assert count["rotary"] == (2 if model.config.position == "rotary" else 0)

    module = program.module()
    K, D = model.config.kv_heads, model.config.head_size
    for B, P, T in ((1, 0, 6), (3, 5, 1), (2, 9, 4)):
        past = [tuple(torch.randn(B, K, P, D) for _ in range(2)) for _ in range(2)]
        mask = torch.ones(B, P + T, dtype=torch.long)
        mask[0, 0] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, P:]
        call = {"attention_mask": mask, "position_ids": positions, "past": past, "use_cache": True}
        out, expected = module(ids_of(B, T), **call), model(ids_of(B, T), **call)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(out.present, expected.present, strict=True):
            assert mine[0].shape == (B, K, P + T, D)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_exports_without_a_cache(build):
    """A bidirectional model has none: ids and mask are all it takes."""
    model = build(dtype=torch.float32, causal=False)
    dim = torch.export.Dim
    free = {0: dim("batch"), 1: dim("sequence")}
    program = torch.export.export(
        model, (ids_of(2, 5),), {"attention_mask": torch.ones(2, 5, dtype=torch.long)},
        dynamic_shapes={"ids": free, "attention_mask": free},
    )  # fmt: skip
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    call = {"attention_mask": mask}
    logits = program.module()(ids_of(3, 8), **call).logits
    torch.testing.assert_close(logits, model(ids_of(3, 8), **call).logits, rtol=1e-5, atol=1e-5)
