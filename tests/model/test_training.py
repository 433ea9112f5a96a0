"""Gradients, dropout seeds, and what a user wrapped around a layer."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(96, (2, 9), generator=generator)
    return ids, ids.roll(-1, dims=1)


def test_gradients_reach_every_parameter(build, options):
    model = build(**options).train()
    model(*batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("qkv.bias"):  # a bias common to all keys moves no softmax
            assert parameter.grad.abs().max() > 1e-9, name


def test_gradient_is_the_slope_of_the_loss(build):
    """Along a random direction, against a difference quotient in float64."""
    model = build(position="rotary", norm_position="sandwich", activation="geglu", qk_norm=True)
    ids, targets = batch()
    options = {"label_smoothing": 0.1, "z_loss": 1e-2}
    model(ids, targets, **options).loss.backward()
    generator = torch.Generator().manual_seed(1)
    directions = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()
    ]
    pairs = list(zip(model.parameters(), directions, strict=True))
    slope = sum((p.grad * d).sum() for p, d in pairs)
    losses = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in pairs:
                p.add_(d, alpha=step)
            losses.append(model(ids, targets, **options).loss)
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("norm_position", ["pre", "post", "sandwich"])
def test_dropout_follows_its_seed(build, norm_position):
    model = build(dropout=0.2, norm_position=norm_position, dtype=torch.float32).train()
    ids, targets = batch()
    one, two = (torch.tensor(n) for n in (1, 2))
    assert model(ids, targets, seed=one).loss == model(ids, targets, seed=one).loss
    assert model(ids, targets, seed=one).loss != model(ids, targets, seed=two).loss
    assert one == 1  # the caller's tensor is not touched
    torch.manual_seed(7)
    first, second = model(ids, targets).loss, model(ids, targets).loss
    torch.manual_seed(7)
    assert first == model(ids, targets).loss
    assert first != second
    model.eval()
    assert model(ids, targets, seed=one).loss == model(ids, targets).loss


@pytest.mark.parametrize("norm_position", ["pre", "post", "sandwich"])
def test_every_use_of_dropout_has_its_own_mask(build, monkeypatch, norm_position):
    from gptopt.model import block, gpt

    seen = []

    def spy(name, real):
        def call(*args, **kwargs):
            if kwargs.get("dropout_p"):
                seen.append((name, int(kwargs["seed"])))
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(block, "layernorm", spy("norm", block.layernorm))
    monkeypatch.setattr(block, "attention", spy("attention", block.attention))
    real = gpt.dropout
    monkeypatch.setattr(
        gpt, "dropout", lambda x, p, seed: seen.append(("embedding", int(seed))) or real(x, p, seed)
    )
    model = build(dropout=0.1, norm_position=norm_position, dtype=torch.float32).train()
    model(*batch(), seed=torch.tensor(100))
    assert sorted(number for _, number in seen) == list(range(100, 107))
    assert sum(name == "attention" for name, _ in seen) == 2


def test_dropout_hits_embedding_probabilities_and_residuals(build):
    """The expectation over masks stays near the model without dropout."""
    model = build(dropout=0.05, n_layer=1)
    ids, _ = batch()
    expected = model(ids).logits
    model.train()
    draws = torch.stack([model(ids, seed=torch.tensor(n)).logits for n in range(200)])
    assert (draws.mean(0) - expected).abs().mean() < 0.25 * draws.std(0).mean()
    assert draws.std(0).min() > 0


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def parametrise(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    layer.bias = None if layer.bias is None else nn.Parameter(2 * layer.bias.detach())


def patch(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("wrap", [hook, parametrise, patch])
@pytest.mark.parametrize("place", ["ffn.up", "ffn.gate", "attn.qkv", "ffn.down", "head"])
def test_nothing_around_a_layer_is_skipped(build, caplog, wrap, place):
    options = {"activation": "swiglu", "tie_head": False}
    ids, targets = batch()
    scaled, wrapped = build(**options), build(**options)

    def layer(model):
        return model.get_submodule(place if place == "head" else f"blocks.1.{place}")

    with torch.no_grad():
        for parameter in layer(scaled).parameters():
            parameter.mul_(2)
    wrap(layer(wrapped))
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        torch.testing.assert_close(wrapped(ids).logits, scaled(ids).logits)
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 5}):
            expected = scaled(ids, targets, **options).loss
            torch.testing.assert_close(wrapped(ids, targets, **options).loss, expected)
    told = [record for record in caplog.records if "wrapped or carries hooks" in record.message]
    assert len(told) == (1 if place in ("ffn.up", "ffn.gate", "head") else 0)


def test_autocast_computes_in_lower_precision_and_learns(build):
    model = build(dtype=torch.float32, position="rotary", qk_norm=True, dropout=0.1).train()
    ids, targets = batch()
    model.eval()
    exact = model(ids, targets).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, targets)
        assert model(ids).logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert out.loss != exact
    torch.testing.assert_close(out.loss, exact, rtol=0.05, atol=0.05)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_small_model_learns_a_short_text(build):
    torch.manual_seed(0)
    model = build(dtype=torch.float32, n_layer=2, dropout=0.0)
    model.init_weights()
    ids, targets = batch()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimiser.zero_grad()
        loss = model(ids, targets).loss
        loss.backward()
        optimiser.step()
    assert loss < 0.1
