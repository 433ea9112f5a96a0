"""Adapters on models: what they change, what they leave alone, and where they can stand."""

import pytest
import torch
from lora_models import SHAPES, tiny, trained

from gptopt.config import LoraOptions
from gptopt.errors import UserError
from gptopt.lora import apply_lora, lora_parameters, merge_lora, names_of_layers

ALL = "attention,ffn"
IDS = torch.arange(22).view(2, 11) * 5 % 64


def adapted(shape, **options):
    return apply_lora(tiny(shape), LoraOptions(**{"rank": 3, "targets": ALL} | options)).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_an_untrained_adapter_leaves_every_bit_of_the_output(shape):
    assert torch.equal(adapted(shape)(IDS).logits, tiny(shape)(IDS).logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weights_say_what_the_adapter_says(shape):
    model = trained(adapted(shape))
    before, plain = model(IDS).logits, tiny(shape)(IDS).logits
    merged = merge_lora(model)
    assert merged.state_dict().keys() == tiny(shape).state_dict().keys()
    assert merged.lora is None
    assert all(parameter.requires_grad for parameter in merged.parameters())
    after = merged(IDS).logits
    assert (after - before).abs().max() <= 2e-5 * (before.max() - before.min())
    assert (before - plain).abs().max() > 0.1  # the adapter says something


@pytest.mark.parametrize("shape", SHAPES)
def test_training_touches_nothing_but_the_adapter(shape):
    model, untouched = adapted(shape).train(), tiny(shape).state_dict()
    assert {id(p) for p in lora_parameters(model)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    # Weight decay would move even what has no gradient.
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    before = [p.detach().clone() for p in lora_parameters(model)]
    for _ in range(3):
        model(IDS[:, :-1], IDS[:, 1:]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in untouched.items())
    moved = [not torch.equal(a, b) for a, b in zip(before, lora_parameters(model), strict=True)]
    assert all(moved)


@pytest.mark.parametrize(
    ("shape", "targets", "count"),
    [
        ("gpt2", "c_proj", 4), ("gpt2", "mlp.c_proj", 2), ("gpt2", "attention", 4),
        ("gpt2", "h.1.attn.c_attn", 1), ("llama", "q_proj,v_proj", 4), ("llama", "k_proj", 2),
        ("llama", "attention", 8), ("llama", "ffn", 6), ("own", "attn.qkv, ffn.up", 4),
    ],
)  # fmt: skip
def test_layers_are_named_as_transformers_names_them(shape, targets, count):
    model = adapted(shape, targets=targets)
    assert len(lora_parameters(model)) == 2 * count
    assert not torch.equal(trained(model)(IDS).logits, tiny(shape)(IDS).logits)


def test_rows_that_are_not_adapted_gain_nothing():
    model = trained(adapted("llama", targets="k_proj"))
    q, k, v = 32, 16, 16
    update = model.blocks[0].attn.qkv_lora.update()
    assert update.shape == (q + k + v, 32)
    assert not update[:q].any()
    assert not update[q + k :].any()
    assert update[q : q + k].abs().min() > 0
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(model.blocks[0].attn.qkv_lora(x), x @ update.T)


@pytest.mark.parametrize("targets", ["conv", "proj", "wte", "attention,q_projj", ""])
def test_an_unknown_layer_is_told_with_the_known_ones(targets):
    model = tiny("llama")
    with pytest.raises(UserError, match=r"self_attn\.q_proj, .*mlp\.down_proj, attention, ffn"):
        apply_lora(model, LoraOptions(rank=2, targets=targets))
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was done
    assert names_of_layers(model)[:2] == ["self_attn.q_proj", "self_attn.k_proj"]


def test_dropout_is_the_adapters_alone_and_follows_the_seed():
    model = trained(adapted("gpt2", dropout=0.5)).train()
    seeds = [torch.tensor(seed) for seed in (1, 1, 2)]
    first, again, other = (model(IDS, seed=seed).logits for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(model.eval()(IDS, seed=seeds[0]).logits, model(IDS).logits)
    # No two modules drop the same channels.
    modules = [model.blocks[0].attn.qkv_lora, model.blocks[1].attn.qkv_lora]
    x = torch.ones(1, 1, 32)
    assert modules[0].number != modules[1].number
    modules[1].load_state_dict(modules[0].state_dict())
    assert not torch.equal(modules[0](x, seeds[0]), modules[1](x, seeds[0]))


def test_a_gate_takes_the_composed_path_and_says_so_once(caplog):
    model = trained(adapted("llama", targets="up_proj"))
    model(IDS), model(IDS)
    assert sum("LoRA is on the gate" in line for line in caplog.messages) == 2  # once in each block


def test_cached_decoding_agrees_with_one_pass():
    model = trained(adapted("llama"))
    whole = model(IDS).logits
    first = model(IDS[:, :4], use_cache=True)
    second = model(IDS[:, 4:], past=first.present).logits
    torch.testing.assert_close(torch.cat((first.logits, second), 1), whole, atol=1e-5, rtol=1e-4)
