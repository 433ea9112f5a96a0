"""Quantisation-aware training: what is rounded and when, and what is saved.

That it helps is tested beside the other worked examples, tests/finetune/test_examples.py.
"""

import pytest
import torch
from safetensors.torch import load_file

from gptopt.checkpoint import load_model
from gptopt.config import ModelConfig
from gptopt.errors import UserError
from gptopt.kernels.quantization import dequantize, quantize
from gptopt.model import GPT
from gptopt.precisions import PRECISIONS
from gptopt.training import train
from gptopt.training.rounding import Rounding


def make(**changes):
    torch.manual_seed(4)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 48, "block_size": 8, "vocab_size": 60}
    return GPT(ModelConfig(**sizes | changes))


@pytest.mark.parametrize("precision", ["q8", "q4", "q2"])
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_are_rounded_and_nothing_else(precision, tied):
    model = make(tie_head=tied)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rounding = Rounding(model.config, precision)
    with rounding.applied(model):
        changed = {
            name
            for name, weight in model.named_parameters()
            if not torch.equal(weight, before[name])
        }
        for name, weight in model.named_parameters():
            assert torch.equal(weight, rounding(name, before[name]))
    matrices = {name for name, weight in before.items() if weight.ndim == 2} - {"wpe.weight"}
    assert changed == matrices
    assert ("head.weight" in changed) != tied
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


def test_the_scores_of_labels_are_rounded_as_the_head_that_they_are():
    scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(8))
    form = PRECISIONS["q4"].head
    expected = dequantize(
        quantize(scores, bits=form.bits, block=form.block, symmetric=form.symmetric)
    )
    assert torch.equal(Rounding(make().config, "q4")("score.weight", scores), expected)


def test_the_weights_come_back_after_an_error():
    model = make()
    before = model.wte.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), Rounding(model.config, "q4").applied(model):
        raise KeyboardInterrupt
    assert torch.equal(model.wte.weight, before)


@pytest.mark.parametrize("precision", ["q4", "q2"])
@pytest.mark.parametrize("method", ["nearest", "search", "gptq"])
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "blocks.0.ffn.up.weight"])
def test_an_export_finds_rounded_weights_again(precision, method, name):
    chosen = PRECISIONS[precision]
    form = chosen.overrides.get(name, chosen.layers)
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(40, 100, generator=generator)
    inputs = torch.randn(300, 100, generator=generator) @ torch.randn(100, 100, generator=generator)
    rounded = Rounding(make().config, precision)(name, weight)
    found = quantize(
        rounded, bits=form.bits, block=form.block, symmetric=form.symmetric, method=method,
        hessian=inputs.T @ inputs / 300 if method == "gptq" else None,
    )  # fmt: skip
    assert not torch.allclose(rounded, weight, atol=1e-3)
    assert (rounded - weight).std() < 3 * 2.0**-form.bits  # as near as so many bits bring it
    torch.testing.assert_close(dequantize(found), rounded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["q4", "q2"])
def test_a_kept_grid_is_that_of_the_start_and_moves_no_weight_with_another(precision):
    model = make()
    rounding = Rounding(model.config, precision)
    weight = model.blocks[1].ffn.up.weight
    name = "blocks.1.ffn.up.weight"
    rounding.keep_grids(model, [name])
    form = PRECISIONS[precision].layers
    fitted = form.fitted(weight.shape[1], looked_up=False)
    found = quantize(
        weight.detach(), bits=form.bits, block=fitted.block, symmetric=form.symmetric,
        method="search",
    )  # fmt: skip
    before = rounding(name, weight.detach())
    assert torch.equal(before, dequantize(found))
    changed = weight.detach().clone()
    changed[3, 5] = 40 * changed[3].abs().max()  # a range would follow it
    after = rounding(name, changed)
    assert after[3, 5] != before[3, 5]
    after[3, 5] = before[3, 5]
    assert torch.equal(after, before)
    other = "blocks.0.ffn.up.weight"  # not among those named
    loose = model.blocks[0].ffn.up.weight.detach().clone()
    loose[3, 5] = 40 * loose[3].abs().max()
    assert rounding(other, loose)[3, 5] == pytest.approx(float(loose[3, 5]), rel=0.05)


def test_the_update_goes_to_the_kept_weights(options):
    """The gradient is taken where the weights are rounded; one step of Adam shows where it goes."""
    given = {"steps": 1, "warmup_steps": 0, "lr": 1e-3, "weight_decay": 0.0, "grad_clip": 0.0}
    plain = load_model(train(options("start", **given, eval_batches=0))["checkpoint"]).model
    source = str(options("start").out)
    result = train(options("qat", **given, init_from=source, qat="q2", schedule="constant"))
    kept = load_file(f"{result['checkpoint']}/optimizer.safetensors")
    stored = load_model(result["checkpoint"]).model
    rounding = Rounding(plain.config, "q2")
    rounding.keep_grids(plain, plain.state_dict())
    for name, weight in plain.named_parameters():
        master = kept[f"master.{name}"]
        # Adam's first step is as long as lr wherever there is a gradient.
        assert (master - weight).abs().max() <= 1e-3 * 1.001
        assert not torch.equal(master, weight)
        assert torch.equal(dict(stored.named_parameters())[name], rounding(name, master))


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_run_with_rounding_resumes_bit_for_bit(options, trained_before):
    same = {"qat": "q4", "schedule": "constant", "model": {"dropout": 0.1}}
    if trained_before:
        same["init_from"] = train(options("start", steps=2, model=same["model"]))["out"]
    whole = train(options("whole", steps=8, **same))
    train(options("parts", steps=4, **same))
    part = train(options("parts", steps=8, resume=True, **same))
    assert part["resumed_from"] == 4
    assert part["train_loss"] == whole["train_loss"]
    files = ("model.safetensors", "optimizer.safetensors")
    for file in files:
        one, other = (load_file(f"{each['checkpoint']}/{file}") for each in (whole, part))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()), file


def test_what_is_evaluated_is_what_is_saved(options):
    from gptopt.config import EvaluateOptions
    from gptopt.evaluate import evaluate

    result = train(options("run", qat="q2", steps=20, lr=1e-2, eval_batches=0))
    found = evaluate(
        EvaluateOptions(model=result["checkpoint"], data=[f"{result['out']}/data"], json=True)
    )
    assert abs(found["val_loss"] - result["val_loss"]) < 1e-5


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"qat": "q5"}, "--qat q5: expected one of q8, q4"), ({"qat": "fp32"}, "--qat fp32")],
)
def test_a_precision_that_rounds_nothing_is_one_line(options, changes, named):
    with pytest.raises(UserError, match=named) as error:
        train(options("run", **changes))
    assert "\n" not in str(error.value)


def test_an_adapter_and_rounding_exclude_each_other(options):
    with pytest.raises(ValueError, match=r"that --lora\.rank freezes"):
        options("run", qat="q4", lora={"rank": 2})
