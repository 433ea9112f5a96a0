"""Model folders and run folders: exact round trips, and one clear line for everything broken."""

import json
import logging
import os
import pickle  # noqa: TID251 - patched to fail

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptopt.checkpoint import load_model, resolve_model, save_model
from gptopt.errors import UserError
from gptopt.manifest import staged_folder
from gptopt.tokenizer import Tokenizer


@pytest.fixture
def tokenizer():
    return Tokenizer.train(["a small text of few characters"], kind="char")


@pytest.fixture
def folder(build, tmp_path):
    """A GPT-2 shaped model folder without a tokenizer."""
    save_model(tmp_path, build(dtype=torch.float32), None)
    return tmp_path


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def line_of(folder):
    """The error of loading a folder, which is one line."""
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option_comes_back_bit_for_bit(build, options, tmp_path, dtype):
    model = build(dtype=dtype, dropout=0.25, **options)
    save_model(tmp_path, model, None)
    loaded = load_model(tmp_path, dtype=dtype)
    assert loaded.model.config == model.config
    assert loaded.folder == tmp_path
    assert loaded.tokenizer is None
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor), name
    ids = torch.arange(9)[None]
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_folder_holds_what_huggingface_expects(build, tmp_path, tokenizer):
    save_model(tmp_path, build(), tokenizer, card="## Numbers\n\nloss 1.0")
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.json", "model.safetensors", "generation_config.json", "README.md",
        "tokenizer.json", "tokenizer_config.json",
    } <= names  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["eos_token_id"] == tokenizer.eos_id
    assert config["gptopt"]["tokenizer_size"] == tokenizer.size
    assert config["dtype"] == "float64"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert card.endswith("loss 1.0\n")
    loaded = load_model(tmp_path).tokenizer
    assert loaded.sha256 == tokenizer.sha256


def test_what_transformers_cannot_say_is_said_in_the_card(build, tmp_path):
    save_model(tmp_path, build(position="alibi", window=3), None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gptopt"
    assert config["gptopt"]["window"] == 3
    card = (tmp_path / "README.md").read_text()
    assert "transformers has no architecture for it (position=alibi, window=3)" in card
    assert "blocks.0.attn.qkv.weight" in load_file(tmp_path / "model.safetensors")


def test_weights_are_float32_unless_told(build, tmp_path):
    save_model(tmp_path, build(dtype=torch.float16), None)
    stored = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    assert stored.dtype == torch.float16
    loaded = load_model(tmp_path).model.wte.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, stored.float())
    assert load_model(tmp_path, dtype=torch.float16).model.wte.weight.dtype == torch.float16


def test_a_loaded_model_does_not_follow_its_file(folder):
    model = load_model(folder).model
    before = model.wte.weight.clone()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4000:] = bytes(4000)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(data)
    assert torch.equal(model.wte.weight, before)


def test_the_kernel_choice_is_not_read_from_a_folder(folder):
    edit_config(folder, kernels="triton", _attn_implementation_internal="evil/kernel")
    assert load_model(folder, kernels="reference").model.kernels == "reference"
    own = json.loads((folder / "config.json").read_text())["gptopt"]
    assert "kernels" not in own
    edit_config(folder, gptopt=own | {"kernels": "triton"})
    assert "kernels='triton'" in line_of(folder)


def test_nothing_in_a_folder_is_executed(folder, monkeypatch, tmp_path_factory):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    witness = tmp_path_factory.mktemp("witness") / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(witness)!r}, 'w')")
    for name in ("pytorch_model.bin", "rng.pt", "state.pkl"):
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    load_model(folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert "auto_map" in line_of(folder)
    edit_config(folder, auto_map=None)
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin is pickled and is never read" in line_of(folder)
    assert not witness.exists()


def test_links_are_followed(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    for path in folder.iterdir():
        (cache / path.name).symlink_to(path)
    loaded, original = load_model(cache), load_model(folder)
    assert torch.equal(loaded.model.wte.weight, original.model.wte.weight)
    assert loaded.folder == cache


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_truncated_weights_are_one_line(folder, kept):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    line = line_of(folder)
    assert "model.safetensors: not readable as safetensors" in line
    assert "truncated" in line


def test_missing_and_unexpected_weights_are_listed_up_to_ten(folder):
    def change(tensors):
        for name in [name for name in tensors if "h.1." in name]:
            tensors[name.replace("h.1.", "h.9.")] = tensors.pop(name)

    edit_weights(folder, change)
    line = line_of(folder)
    lacks, holds = line.split(";")[:2]
    assert "the weights lack h.1.attn.c_attn.bias, " in lacks
    assert "which config.json asks for" in lacks
    assert "the weights hold h.9.attn.c_attn.bias, " in holds
    assert lacks.count("h.1.") == holds.count("h.9.") == 10
    assert "and 2 more" in lacks
    assert "and 2 more" in holds


def test_wrong_shapes_and_dtypes_name_both_sides(folder):
    def shape(tensors):
        tensors["transformer.h.0.mlp.c_fc.bias"] = torch.zeros(5)

    def dtype(tensors):
        tensors["transformer.h.0.mlp.c_fc.bias"] = torch.zeros(128, dtype=torch.int8)

    edit_weights(folder, shape)
    assert "h.0.mlp.c_fc.bias is (5,) in the weights and (128,) by config.json" in line_of(folder)
    edit_weights(folder, dtype)
    assert "h.0.mlp.c_fc.bias is of dtype I8, expected a float" in line_of(folder)


def test_weights_that_are_not_finite_are_counted(folder, caplog):
    def change(tensors):
        tensors["transformer.wte.weight"][3, :5] = float("nan")
        tensors["transformer.ln_f.bias"][0] = float("inf")

    edit_weights(folder, change)
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert "6 weights are NaN or infinite, in 2 tensors (norm.bias, wte.weight)" in caplog.text


def test_a_tied_copy_of_the_head_is_checked(folder):
    def equal(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    def other(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    edit_weights(folder, equal)
    assert load_model(folder).model.head is None
    edit_weights(folder, other)
    assert "lm_head.weight differs" in line_of(folder)


def test_a_tokenizer_may_have_fewer_ids_than_the_model_but_not_more(build, tmp_path, tokenizer):
    save_model(tmp_path, build(vocab_size=tokenizer.size + 9), tokenizer)
    assert load_model(tmp_path).tokenizer.size == tokenizer.size
    save_model(tmp_path, build(vocab_size=tokenizer.size - 1), None)
    line = line_of(tmp_path)
    assert f"the tokenizer has {tokenizer.size} ids" in line
    assert f"has {tokenizer.size - 1};" in line


def test_a_changed_config_contradicts_our_own(folder):
    edit_config(folder, n_head=8)
    assert "n_head=8 contradicts 4 under the key 'gptopt'" in line_of(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gptopt": None}, "expected an object under 'gptopt', found None"),
        ({"gptopt": {"n_layer": 2}}, "vocab_size is missing"),
        ({"gptopt": {"n_layer": -2, "vocab_size": 9}}, "n_layer=-2: Input should be greater"),
        ({"gptopt": {"n_head": 5, "vocab_size": 9}}, "not divisible"),
        ({"model_type": "mamba", "gptopt": {"vocab_size": 9}}, "model_type is 'mamba'"),
        ({"model_type": ["gpt2"]}, "model_type is ['gpt2']"),
    ],
)
def test_a_damaged_own_config_is_one_line(folder, changes, expected):
    edit_config(folder, **changes)
    assert expected in line_of(folder)


def test_more_layers_than_tensors_are_not_built(folder):
    values = json.loads((folder / "config.json").read_text())
    own = values["gptopt"] | {"n_layer": 4000}
    edit_config(folder, n_layer=4000, gptopt=own)
    assert "4000 layers do not fit" in line_of(folder)


def test_malformed_json_is_one_line(folder):
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        (folder / "config.json").write_bytes(content)
        assert "config.json" in line_of(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "neither config.json" in line_of(folder)


def test_shards_are_read_through_their_index(folder):
    tensors = load_file(folder / "model.safetensors")
    expected = load_model(folder).model.state_dict()
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    table = {}
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, folder / name)
        table |= dict.fromkeys(names, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    state = load_model(folder).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    (folder / "model-00002-of-00002.safetensors").rename(folder / "elsewhere.safetensors")
    assert "model-00002-of-00002.safetensors: listed in" in line_of(folder)
    for bad in ("../x.safetensors", "/etc/passwd", 7, "a/b.safetensors", "x.bin"):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        assert "is not a plain name of a shard" in line_of(folder)
    index.write_text(json.dumps({"weight_map": []}))
    assert "has no weight_map" in line_of(folder)


def test_a_model_that_was_wrapped_is_not_saved_as_a_plain_one(build, tmp_path):
    model = build()
    model.blocks[1].ffn.up.adapter = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"not those of a plain GPT: blocks.1.ffn.up.adapter"):
        save_model(tmp_path, model, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="limits of a process are POSIX")
def test_a_full_disk_leaves_no_folder_and_the_old_one_intact(build, tmp_path):
    import resource

    model, target = build(), tmp_path / "model"
    with staged_folder(target) as staging:
        save_model(staging, model, None)
    before = (target / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"cannot be written .* free space"),
            staged_folder(target, force=True) as staging,
        ):
            save_model(staging, model, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "model.safetensors").read_bytes() == before


@pytest.fixture
def run(build, tmp_path):
    """A run with three checkpoints, told apart by their vocabulary."""
    for step in (100, 200, 300):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        save_model(folder, build(vocab_size=step), None)
    (tmp_path / "checkpoints" / ".tmp-step-000400-9").mkdir()
    (tmp_path / "latest").write_text("step-000300\n")
    return tmp_path


def test_a_run_stands_for_its_best_checkpoint_else_its_last(run):
    def step(checkpoint):
        return resolve_model(run, checkpoint).name

    assert step("auto") == step("last") == step("300") == "step-000300"
    with pytest.raises(UserError, match="never evaluated"):
        step("best")
    (run / "best").write_text("step-000100")
    assert step("auto") == step("best") == "step-000100"
    assert step("last") == "step-000300"
    assert step("200") == "step-000200"
    assert load_model(run, checkpoint="200").model.config.vocab_size == 200
    with pytest.raises(UserError, match="no checkpoint of step 400; there are 100, 200, 300"):
        step("400")
    with pytest.raises(UserError, match="expected auto, best, last or a step number"):
        step("newest")
    (run / "best").write_text("../../etc")
    with pytest.raises(UserError, match="which is not in checkpoints/"):
        step("best")
    (run / "best").unlink()
    (run / "latest").unlink()
    assert step("auto") == "step-000300"


def test_what_is_no_model_is_said_so(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for ref, expected in (
        (empty, "neither config.json nor checkpoints/"),
        (empty / "none", "no such folder"),
        (folder / "config.json", "is not a folder"),
        ("gpt2", "gpt2: no such folder; expected a model folder, a run folder or hf:org/name"),
    ):
        with pytest.raises(UserError, match=expected):
            resolve_model(ref)
    with pytest.raises(UserError, match="is no run folder"):
        resolve_model(folder, "best")
    with pytest.raises(UserError, match="is no run folder"):
        resolve_model("hf:org/name", "best")
    (empty / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        resolve_model(empty)
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in line_of(folder)
