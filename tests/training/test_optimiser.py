"""Decay groups, and moments that go to tensors and back."""

import pytest
import torch

from gptopt.config import ModelConfig
from gptopt.errors import CheckFailed
from gptopt.model import GPT
from gptopt.training.optimiser import (
    build_optimiser,
    decay_groups,
    load_optimiser_tensors,
    optimiser_tensors,
)

CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, qk_norm=True, tie_head=False
)


def step(model, optimiser):
    ids = torch.randint(0, 64, (3, 9))
    model(ids[:, :-1], ids[:, 1:]).loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def test_matrices_and_embeddings_decay_and_nothing_else_does():
    model = GPT(CONFIG)
    decayed, kept = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert decayed_names | kept_names == set(names.values())
    assert not decayed_names & kept_names
    assert {"wte.weight", "wpe.weight", "head.weight"} <= decayed_names
    assert all("norm" in name or name.endswith("bias") for name in kept_names)
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)


def test_a_tied_head_is_updated_once():
    model = GPT(CONFIG.model_copy(update={"tie_head": True}))
    groups = decay_groups(model, 0.1)
    assert sum(p.numel() for g in groups for p in g["params"]) == model.num_parameters()


def test_decay_pulls_weights_without_a_gradient_to_zero_but_no_bias(options):
    model = GPT(CONFIG)
    optimiser = build_optimiser(model, options(weight_decay=0.5, lr=0.1))
    matrix, bias = model.blocks[0].ffn.up.weight, model.blocks[0].ffn.up.bias
    torch.nn.init.ones_(bias)
    before = matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(bias, torch.ones_like(bias))


def test_moments_go_to_tensors_and_back_bit_for_bit(options):
    model = GPT(CONFIG)
    optimiser = build_optimiser(model, options())
    for _ in range(3):
        step(model, optimiser)
    tensors = {name: value.clone() for name, value in optimiser_tensors(model, optimiser).items()}
    assert len(tensors) == 3 * len(list(model.parameters()))

    twin = GPT(CONFIG)
    twin.load_state_dict(model.state_dict())
    again = build_optimiser(twin, options())
    load_optimiser_tensors(twin, again, tensors)
    torch.manual_seed(1)
    step(model, optimiser)
    torch.manual_seed(1)
    step(twin, again)
    for (name, left), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_moments_of_another_model_are_refused_by_name(options):
    model = GPT(CONFIG)
    optimiser = build_optimiser(model, options())
    step(model, optimiser)
    tensors = optimiser_tensors(model, optimiser)
    other = GPT(CONFIG.model_copy(update={"n_layer": 1}))
    with pytest.raises(CheckFailed, match=r"blocks\.1\..* belongs to no parameter"):
        load_optimiser_tensors(other, build_optimiser(other, options()), tensors)
    wider = GPT(CONFIG.model_copy(update={"n_inner": 32}))
    with pytest.raises(CheckFailed, match="should have shape"):
        load_optimiser_tensors(wider, build_optimiser(wider, options()), tensors)
