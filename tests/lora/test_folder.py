"""Adapter folders: what is written, what is read, and whose base they accept."""

import json

import pytest
import torch
from lora_models import SHAPES, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptopt.checkpoint import load_model, save_model
from gptopt.errors import UserError
from gptopt.lora.layers import weights_sha256
from gptopt.manifest import read_json, write_json

ALL = "attention,ffn"


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_comes_back_bit_for_bit_alone_and_beside_its_base(saved, ids, shape):
    base, folder, model = saved(shape, targets=ALL)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    expected = model(ids).logits
    alone, beside = load_model(folder), load_model(base, adapter=folder)
    for loaded in (alone, beside):
        assert torch.equal(loaded.model(ids).logits, expected)
        assert loaded.folder == base
        assert loaded.model.base == model.base
    assert not torch.equal(load_model(base).model(ids).logits, expected)


def test_the_file_holds_the_adapter_alone_and_tells_the_sha256_of_its_base(saved):
    _, folder, _ = saved("llama", targets="q_proj,v_proj")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["base_sha256"] == weights_sha256(tiny("llama"))
        names = list(file.keys())
    assert len(names) == 8
    assert "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight" in names
    config = read_json(folder / "adapter_config.json")
    assert config["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert config["base_model_name_or_path"] == str(folder.with_name("base"))


def test_the_sha256_is_of_weights_not_of_files(saved, tmp_path):
    base, _, model = saved("gpt2")
    tensors = load_file(base / "model.safetensors")
    save_file(dict(reversed(tensors.items())), base / "model.safetensors", metadata={"a": "b"})
    assert weights_sha256(load_model(base).model) == model.base.sha256
    tensors["transformer.ln_f.bias"][3] += 1e-3
    save_file(tensors, base / "model.safetensors")
    assert weights_sha256(load_model(base).model) != model.base.sha256


def test_another_base_is_refused_with_the_beginnings_of_both_hashes(saved, tmp_path):
    base, folder, model = saved("gpt2")
    other = tmp_path / "other"
    other.mkdir()
    save_model(other, tiny("gpt2", seed=9), None)
    theirs = weights_sha256(tiny("gpt2", seed=9))
    with pytest.raises(UserError) as caught:
        load_model(other, adapter=folder)
    for part in (model.base.sha256[:12], theirs[:12], str(base), str(folder)):
        assert part in str(caught.value)


def test_an_adapter_without_a_hash_is_held_to_names_and_shapes(saved, ids):
    base, folder, model = saved("gpt2")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path)  # as PEFT writes it
    assert torch.equal(load_model(base, adapter=folder).model(ids).logits, model(ids).logits)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, path)
    with pytest.raises(UserError, match="do not belong together"):
        load_model(base, adapter=folder)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}, path)
    with pytest.raises(UserError, match="lm_head, which this model has no place for"):
        load_model(base, adapter=folder)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(UserError, match="is missing"):
        load_model(base, adapter=folder)
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, path)
    with pytest.raises(UserError, match="no finite number"):
        load_model(base, adapter=folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora=True changes what the adapter computes"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["wte"]}, "modules_to_save"),
        ({"rank_pattern": {"c_attn": 4}}, "rank_pattern"),
        ({"r": "many"}, "r is 'many', expected a number"),
        ({"r": -1}, "r is -1"),
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "rank=2.5"),
        ({"r": True}, "r is True"),
        ({"r": 4}, "do not belong together"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": 1e999}, "lora_alpha is inf"),
        ({"lora_dropout": 1.5}, "dropout=1.5"),
        ({"base_model_name_or_path": 7}, "expected a name"),
        ({"target_modules": [True]}, "target_modules is .True., expected names of layers"),
    ],
)
def test_a_configuration_of_something_else_is_one_clear_line(saved, change, said):
    base, folder, _ = saved("gpt2")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | change))
    with pytest.raises(UserError, match=said) as caught:
        load_model(base, adapter=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "nowhere", "hf:org/name", "org/name"])
def test_a_base_that_is_not_here_is_asked_for(saved, name):
    base, folder, _ = saved("gpt2")
    path = folder / "adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": name})
    with pytest.raises(UserError, match="give the base as the model and this folder as --adapter"):
        load_model(folder)
    write_json(path, read_json(path) | {"base_model_name_or_path": str(folder)})  # itself
    with pytest.raises(UserError, match="is not a model folder here"):
        load_model(folder)
    assert load_model(base, adapter=folder).model.lora is not None


def test_models_and_adapters_are_not_mistaken_for_each_other(saved):
    base, folder, _ = saved("gpt2")
    with pytest.raises(UserError, match="holds a whole model, no adapter"):
        load_model(base, adapter=base)
    with pytest.raises(UserError, match="is an adapter itself; give its base"):
        load_model(folder, adapter=folder)


def test_a_damaged_file_is_one_clear_line(saved):
    _, folder, _ = saved("gpt2")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="not readable as safetensors"):
        load_model(folder)
    path.unlink()
    with pytest.raises(UserError, match="not readable as safetensors"):
        load_model(folder)


def test_rslora_scales_by_the_root_of_the_rank(saved, ids):
    _, folder, model = saved("gpt2", rank=4, alpha=8.0)
    path = folder / "adapter_config.json"
    # 4 / sqrt(4) is 8 / 4.
    write_json(path, read_json(path) | {"use_rslora": True, "lora_alpha": 4})
    assert torch.equal(load_model(folder).model(ids).logits, model(ids).logits)
