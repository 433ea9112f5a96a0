"""Training an adapter: what a run keeps, how it goes on, and what it leaves alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptopt.checkpoint import load_model
from gptopt.config import TrainOptions
from gptopt.errors import UserError
from gptopt.training import train
from gptopt.training.checkpoints import Checkpoints

LORA = {"rank": 2, "dropout": 0.3, "targets": "attention,ffn"}


@pytest.fixture
def base(options):
    return train(options("base", steps=4))["checkpoint"]


@pytest.fixture
def run(options, base):
    """run(out, **changes): the result of a LoRA run on the base."""

    def go(out="tuned", shape=None, lora=LORA, **changes):
        made = options(out, **{"init_from": base, "lora": lora, "lr": 0.02} | changes)
        dumped = made.model_dump(by_alias=True) | {"model": shape or {}}
        return train(TrainOptions.model_validate(dumped))

    return go


def test_a_checkpoint_holds_the_adapter_alone_and_the_base_stays_as_it_is(run, base):
    before = {name: value.clone() for name, value in load_model(base).model.state_dict().items()}
    result = run()
    folder = Path(result["checkpoint"])
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"} <= names
    assert not {"model.safetensors", "config.json"} & names
    tuned = load_model(result["out"]).model.state_dict()  # the run folder is a model, too
    assert all(torch.equal(tuned[name], value) for name, value in before.items())
    learned = load_file(folder / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for value in learned.values())
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.split(".", 1)[1] for name in moments} == tuned.keys() - before.keys()


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "shape": {"dropout": 0.2}}])
def test_an_interrupted_run_goes_on_bit_for_bit(run, dying_after, changes):
    straight = run("straight", **changes)
    with dying_after(4):
        run("again", **changes)
    result = run("again", resume=True, **changes)
    assert result["resumed_from"] in (2, 4)
    ends = [Checkpoints(Path(each["out"])).of(6) for each in (straight, result)]
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert straight["train_loss"] == result["train_loss"]
    assert straight["val_loss"] == result["val_loss"]


def test_another_adapter_does_not_resume_the_run(run):
    run(steps=2)
    with pytest.raises(UserError, match=r"another lora\.rank: the run has 2, this command says 3"):
        run(steps=4, resume=True, lora=LORA | {"rank": 3})


def test_a_base_that_changed_under_a_run_is_noticed(run, base):
    run(steps=2)
    path = Path(base) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="was trained on another base"):
        run(steps=4, resume=True)


def test_lora_needs_a_model_to_adapt(options):
    with pytest.raises(UserError, match="name it with --init-from"):
        train(options(lora=LORA))


def test_an_unknown_layer_ends_in_one_line(run):
    with pytest.raises(UserError, match=r"targets conv: .* attn\.c_attn, .*attention, ffn"):
        run(lora=LORA | {"targets": "conv"})


def test_an_adapter_is_trained_on_or_merged_when_a_run_starts_from_it(run, base):
    first = run(steps=2)["checkpoint"]
    with pytest.raises(UserError, match="has an adapter of rank 2"):
        run("other", steps=1, init_from=first, lora={"rank": 3})
    tiny = {"lr": 1e-12, "min_lr": 0, "weight_decay": 0, "steps": 1, "init_from": first}
    further = run("further", **tiny)["checkpoint"]
    whole = run("whole", lora={}, **tiny)["checkpoint"]
    assert json.loads((Path(further) / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(Path(base).resolve())
    ids = torch.arange(8)[None]
    expected = load_model(first).model(ids).logits
    for each in (further, whole):
        torch.testing.assert_close(load_model(each).model(ids).logits, expected)
    assert (Path(whole) / "model.safetensors").is_file()
