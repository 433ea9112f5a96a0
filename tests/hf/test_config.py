"""Foreign config keys are used, known to be harmless, or an error: nothing changes silently."""

import logging
from pathlib import Path

import pytest

from gptopt import hf
from gptopt.config import PRESETS, ModelConfig
from gptopt.errors import UserError

WHERE = Path("somewhere/config.json")
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 100}
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32,
    "intermediate_size": 64, "vocab_size": 100,
}  # fmt: skip

QWEN = LLAMA | {"model_type": "qwen2"}


def read(base, **changes):
    return hf.config_from_json(base | changes, WHERE)[0]


def line(base, **changes):
    with pytest.raises(UserError) as error:
        read(base, **changes)
    text = str(error.value)
    assert text.startswith("somewhere/config.json: ")
    assert "\n" not in text
    return text


def test_missing_keys_mean_what_they_mean_to_transformers():
    gpt2 = read({"model_type": "gpt2"})
    assert gpt2 == ModelConfig(vocab_size=50257, dropout=0.1)
    llama = read({"model_type": "llama"})
    assert (llama.n_embd, llama.ffn_width, llama.kv_heads) == (4096, 11008, 32)
    assert (llama.norm_eps, llama.rotary_base, llama.block_size) == (1e-6, 10000.0, 2048)
    assert not llama.tie_head
    assert not llama.bias


def test_missing_keys_agree_with_the_installed_transformers():
    from transformers import (
        GPT2Config,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
    )

    for cls in (GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config):
        full = hf.config_from_json(cls().to_dict() | {"model_type": cls.model_type}, WHERE)[0]
        bare = hf.config_from_json({"model_type": cls.model_type}, WHERE)[0]
        assert full.model_dump(exclude={"head_dim", "n_kv_head"}) == bare.model_dump(
            exclude={"head_dim", "n_kv_head"}
        )
        assert (full.head_size, full.kv_heads) == (bare.head_size, bare.kv_heads)


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": None, "rope_theta": 7}, 7.0),
    ],
)
def test_rotary_base_from_old_and_new_keys(changes, theta):
    assert read(LLAMA, **changes).rotary_base == theta


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters="),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters="),
        (LLAMA, {"rope_parameters": [1]}, "rope_parameters: expected an object"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "different values"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True and mlp_bias=False"),
        (LLAMA, {"mlp_bias": True}, "attention_bias=False and mlp_bias=True"),
        (LLAMA, {"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        (LLAMA, {"hidden_act": ["silu"]}, "hidden_act=['silu']"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (LLAMA, {"num_key_value_heads": 3}, "not divisible by n_kv_head=3"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        (GPT2, {"pruned_heads": {"0": [1]}}, "pruned_heads="),
        (GPT2, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map="),
        (GPT2, {"activation_function": "tanh"}, "activation_function='tanh'"),
        (GPT2, {"n_embd": "wide"}, "n_embd='wide'"),
        (GPT2, {"n_embd": 33}, "n_embd=33 is not divisible by n_head=4"),
        (GPT2, {"n_layer": -1}, "n_layer=-1"),
        (GPT2, {"vocab_size": 2**31}, "vocab_size=2147483648"),
        (GPT2, {"vocab_size": None}, "vocab_size"),
        (GPT2, {"model_type": "mamba"}, "model_type is 'mamba'"),
        (QWEN, {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
        (QWEN, {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
        (QWEN, {"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_scaling="),
        ({}, {}, "model_type is None"),
    ],
)  # fmt: skip
def test_keys_that_change_the_maths_are_refused(base, changes, named):
    assert named in line(base, **changes)


def test_harmless_keys_are_silent_and_unknown_ones_told(caplog):
    caplog.set_level(logging.WARNING)
    harmless = {
        "architectures": ["GPT2LMHeadModel"], "bos_token_id": 1, "initializer_range": 0.02,
        "n_ctx": 1024, "summary_type": "cls_index", "task_specific_params": {"a": 1},
        "torch_dtype": "float32", "dtype": "float16", "transformers_version": "4.0.0",
        "use_cache": True, "_name_or_path": "gpt2", "sliding_window": None,
        "scale_attn_weights": True, "reorder_and_upcast_attn": False,
    }  # fmt: skip
    assert read(GPT2, **harmless) == read(GPT2)
    assert not caplog.records
    read(GPT2, sliding_window=4)
    assert "keys not known for gpt2 are ignored: ['sliding_window']" in caplog.text


def test_dropouts_that_differ_are_told(caplog):
    assert read(GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).dropout == 0.0
    assert not caplog.records
    assert read(GPT2, resid_pdrop=0.2).dropout == 0.2
    assert "one dropout for all" in caplog.text


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_there_and_back(name):
    config = ModelConfig(**PRESETS[name]["model"], vocab_size=320)
    values = hf.config_to_json(config, tokenizer_size=300)
    expected = {"transformer-2017": "gptopt"}.get(name, "llama" if "llama" in name else "gpt2")
    assert values["model_type"] == expected
    assert hf.config_from_json(values, WHERE) == (config, expected)
    del values["gptopt"]
    if expected != "gptopt":
        # Without our own key the same model is read from theirs.
        theirs = hf.config_from_json(values, WHERE)[0]
        assert hf.config_to_json(theirs)["model_type"] == expected
        for key in ("head_size", "kv_heads", "ffn_width", "position", "norm", "activation"):
            assert getattr(theirs, key) == getattr(config, key)


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({}, "llama"), ({"bias": True}, "llama"), ({"window": 4}, "mistral"),
        ({"qkv_bias": True}, "qwen2"), ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "qkv_bias": True}, "gptopt"),
        ({"qk_norm": True, "bias": True}, "gptopt"),
        ({"bias": True, "qkv_bias": False}, "gptopt"), ({"window": 4, "bias": True}, "gptopt"),
    ],
)  # fmt: skip
def test_a_model_is_written_as_the_first_architecture_that_expresses_it(options, architecture):
    base = {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "bias": False}
    config = ModelConfig(**base | options, vocab_size=64, n_kv_head=4)
    values = hf.config_to_json(config)
    assert values["model_type"] == architecture
    assert hf.config_from_json(values, WHERE) == (config, architecture)
    if architecture != "gptopt":
        del values["gptopt"]
        theirs = hf.config_from_json(values, WHERE)[0]
        assert (theirs.window, theirs.biased_qkv, theirs.qk_norm) == (
            config.window, config.biased_qkv, config.qk_norm,
        )  # fmt: skip


def test_obstacles_name_what_an_architecture_cannot_say():
    config = ModelConfig(vocab_size=64, position="alibi", window=4, n_kv_head=4, head_dim=32)
    assert hf.obstacles(config, "gpt2") == [
        "position=alibi", "window=4", "n_kv_head=4", "head_dim=32",
    ]  # fmt: skip
    assert hf.architecture_of(config) == "gptopt"
    nearest = hf.config_to_json(config, architecture="llama")
    assert nearest["model_type"] == "llama"
    assert nearest["num_key_value_heads"] == 4
