"""What calibration counts: the inputs of every product, whoever computes it."""

import pytest
import torch
from random_models import random_gpt

from gptopt.errors import UserError
from gptopt.export.calibration import MAX_TOKENS, Calibration

WIDTH = 136  # the models' block_size, and so a window


@pytest.fixture(scope="module")
def model():
    return random_gpt(activation="swiglu", n_kv_head=2, tie_head=True)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 2048, (5 * WIDTH,), generator=torch.Generator().manual_seed(0)).tolist()


def inputs_of(model, layer, ids):
    """What a linear layer that is called as a module reads, (n, K)."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        for start in range(0, len(ids), WIDTH):
            model(torch.tensor([ids[start : start + WIDTH]]))
    hook.remove()
    return torch.cat(seen)


def test_statistics_are_those_of_the_inputs(model, ids):
    calibration = Calibration(model, ids)
    for name in ("blocks.1.attn.qkv", "blocks.0.ffn.down"):
        x = inputs_of(model, model.get_submodule(name), ids)
        weight = f"{name}.weight"
        torch.testing.assert_close(calibration.moments(weight), x.square().mean(0))
        torch.testing.assert_close(
            calibration.hessian(weight), x.T @ x / len(x), rtol=1e-4, atol=1e-4
        )


def test_every_product_is_seen_and_no_look_up(model, ids):
    calibration = Calibration(model, ids)
    for name, weight in model.named_parameters():
        multiplied = weight.dim() == 2 and "wpe" not in name
        assert (calibration.moments(name) is not None) == multiplied, name
        assert (calibration.hessian(name) is not None) == multiplied, name
    # up and gate are read inside the ffn operator, and from the same input.
    torch.testing.assert_close(
        calibration.moments("blocks.0.ffn.up.weight"),
        calibration.moments("blocks.0.ffn.gate.weight"),
    )


def test_a_small_budget_takes_more_passes_and_finds_the_same(model, ids, monkeypatch):
    passes = 0
    run = Calibration._run

    def counted(self, first):
        nonlocal passes
        passes += 1
        return run(self, first)

    monkeypatch.setattr(Calibration, "_run", counted)
    large, small = Calibration(model, ids), Calibration(model, ids, budget_bytes=3 * 4 * 32**2)
    names = [name for name in dict(model.named_parameters()) if large.moments(name) is not None]
    assert passes == 1
    for name in names:
        torch.testing.assert_close(large.hessian(name), small.hessian(name))
    assert 3 < passes <= len(names) + 2
    assert sum(found.numel() for found in small._hessians.values()) <= 128**2


def test_the_ranges_of_the_cache_are_the_largest_magnitudes(model, ids):
    ranges = Calibration(model, ids).cache_ranges()
    assert len(ranges) == 2
    with torch.no_grad():
        rows = torch.tensor(ids).view(-1, WIDTH)
        present = model(rows, use_cache=True).present
    for found, (key, value) in zip(ranges, present, strict=True):
        torch.testing.assert_close(found[0], key.abs().amax((0, 2)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], value.abs().amax((0, 2)), rtol=1e-4, atol=1e-5)


def test_a_model_without_a_cache_has_no_ranges(ids):
    model = random_gpt(causal=False)
    calibration = Calibration(model, ids)
    assert calibration.cache_ranges() == []
    assert calibration.moments("blocks.0.ffn.down.weight") is not None


def test_a_long_text_is_sampled_all_over(model):
    windows = Calibration(model, range(100_000))._windows
    assert len(windows) == MAX_TOKENS // WIDTH
    starts = torch.tensor([int(window[0, 0]) for window in windows])
    assert starts[0] == 0
    assert starts[-1] > 90_000
    assert starts.diff().min() >= WIDTH


def test_a_short_text_is_one_line(model):
    with pytest.raises(UserError, match="3 tokens, expected at least 512"):
        Calibration(model, [1, 2, 3])
