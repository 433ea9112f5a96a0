"""The model against the same maths written out in a few lines of plain PyTorch, per sequence."""

import math

import pytest
import torch
import torch.nn.functional as F

T, C, H, D = 10, 32, 4, 8


def norm(model, name, x):
    state = model.state_dict()
    if model.config.norm == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    y = centred / (variance + 1e-5).sqrt() * state[f"{name}.weight"]
    return y + state.get(f"{name}.bias", 0)


def linear(model, name, x):
    state = model.state_dict()
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def attend(model, name, x, bias):
    K = model.config.kv_heads
    q, k, v = linear(model, f"{name}.qkv", x).split([H * D, K * D, K * D], dim=-1)
    heads = []
    for head in range(H):
        mine, group = slice(head * D, head * D + D), head * K // H
        theirs = slice(group * D, group * D + D)
        a, b, c = q[:, mine], k[:, theirs], v[:, theirs]
        if model.config.qk_norm:
            a, b = norm_head(model, name, "q", a), norm_head(model, name, "k", b)
        scores = a @ b.T / math.sqrt(D)
        if model.config.attn_softcap:
            scores = model.config.attn_softcap * (scores / model.config.attn_softcap).tanh()
        heads.append((scores + bias[head]).softmax(-1) @ c)
    return linear(model, f"{name}.proj", torch.cat(heads, dim=-1))


def norm_head(model, name, which, x):
    weight = model.state_dict()[f"{name}.{which}_norm.weight"]
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def feed_forward(model, name, x):
    kind = model.config.activation
    up = linear(model, f"{name}.up", x)
    hidden = {
        "relu": lambda: up.clamp(min=0),
        "relu2": lambda: up.clamp(min=0) ** 2,
        "gelu": lambda: up * (1 + torch.erf(up / math.sqrt(2))) / 2,
        "gelu_tanh": lambda: (
            up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) / 2
        ),
        "swiglu": lambda: up * torch.sigmoid(up) * linear(model, f"{name}.gate", x),
        "geglu": lambda: (
            up * (1 + torch.erf(up / math.sqrt(2))) / 2 * linear(model, f"{name}.gate", x)
        ),
    }[kind]()
    return linear(model, f"{name}.down", hidden)


def by_hand(model, ids):
    config, state = model.config, model.state_dict()
    x = state["wte.weight"][ids]
    if config.position == "learned":
        x = x + state["wpe.weight"][: len(ids)]
    if config.position == "sinusoidal":
        x = x * math.sqrt(C)
        for t in range(len(ids)):
            for i in range(0, C, 2):
                x[t, i] += math.sin(t / 10000 ** (i / C))
                x[t, i + 1] += math.cos(t / 10000 ** (i / C))
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    hidden = distance < 0
    if config.window:
        hidden |= distance >= config.window
    bias = torch.zeros(H, T, T, dtype=x.dtype).masked_fill(hidden, -math.inf)
    if config.position == "alibi":
        bias = bias - torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])[:, None, None] * distance
    for i in range(config.n_layer):
        a, f = f"blocks.{i}.attn", f"blocks.{i}.ffn"
        n1, n2 = f"blocks.{i}.norm_1", f"blocks.{i}.norm_2"
        if config.norm_position == "pre":
            x = x + attend(model, a, norm(model, n1, x), bias)
            x = x + feed_forward(model, f, norm(model, n2, x))
        elif config.norm_position == "post":
            x = norm(model, n1, x + attend(model, a, x, bias))
            x = norm(model, n2, x + feed_forward(model, f, x))
        else:
            x = x + norm(model, f"{n1}_out", attend(model, a, norm(model, n1, x), bias))
            x = x + norm(model, f"{n2}_out", feed_forward(model, f, norm(model, n2, x)))
    if config.norm_position != "post":
        x = norm(model, "norm", x)
    logits = x @ state["wte.weight" if config.tie_head else "head.weight"].T
    cap = config.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("norm_position", ["pre", "post", "sandwich"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position": "sinusoidal", "activation": "relu"},
        {"position": "alibi", "activation": "relu2", "norm": "rmsnorm", "window": 4},
        {"position": "none", "activation": "geglu", "n_kv_head": 2, "qk_norm": True},
        {"activation": "swiglu", "n_kv_head": 1, "bias": False, "tie_head": False},
        {"activation": "gelu", "attn_softcap": 2.0, "logit_softcap": 3.0},
    ],
)
def test_logits_equal_the_maths_written_out(build, norm_position, options):
    model = build(norm_position=norm_position, **options)
    ids = torch.randint(96, (T,))
    # Sinusoids and slopes are fp32 numbers in the model.
    torch.testing.assert_close(model(ids[None]).logits[0], by_hand(model, ids), rtol=0, atol=1e-5)


def test_rotary_scores_depend_on_distance_only(build):
    """Turning by position angles, written out for one pair of channels at a time."""
    from gptopt.model.embeddings import rotary_tables

    cos, sin = rotary_tables(torch.tensor([[0, 1, 7, 300]]), D, 10000.0)
    for row, position in enumerate((0, 1, 7, 300)):
        for i in range(D // 2):
            angle = position / 10000 ** (2 * i / D)
            assert cos[0, row, i].item() == pytest.approx(math.cos(angle), abs=3e-5)
            assert sin[0, row, i].item() == pytest.approx(math.sin(angle), abs=3e-5)
    model = build(position="rotary")
    ids = torch.randint(96, (1, T))
    shifted = model(ids, position_ids=torch.arange(30, 30 + T)[None]).logits
    torch.testing.assert_close(shifted, model(ids).logits, rtol=0, atol=1e-4)


def test_alibi_slopes_are_the_published_ones():
    from gptopt.model.embeddings import alibi_slopes

    cpu = torch.device("cpu")
    eight = [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(8, cpu).tolist() == eight
    twelve = [2 ** (-n / 2) for n in range(1, 9, 2)]
    torch.testing.assert_close(alibi_slopes(12, cpu), torch.tensor(eight + twelve))
    assert alibi_slopes(1, cpu).tolist() == [2.0**-8]
    assert F.relu(alibi_slopes(25, cpu)).shape == (25,)
