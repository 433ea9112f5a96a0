"""Tiny random transformers models, made once: their import alone takes seconds."""

import json
import warnings

import pytest
import torch

SHAPES = {
    "gpt2": {},
    "gpt2_untied_relu": {"tie_word_embeddings": False, "activation_function": "relu"},
    "gpt2_gelu_inner": {"activation_function": "gelu", "n_inner": 48},
    "llama": {},
    "llama_gqa_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama_mqa_head_dim": {"num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 1e-3},
    "llama_bias_gelu_theta": {
        "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    },
    "mistral_window": {"num_key_value_heads": 2, "sliding_window": 7},
    "mistral_whole": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": 9},
}  # fmt: skip
CLASSES = {
    "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config", "phi3": "Phi3Config",
}  # fmt: skip


def make(name):
    """A shaken model of transformers: embeddings, biases and norms all count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    torch.manual_seed(11)
    if name.startswith("gpt2"):
        config = transformers.GPT2Config(
            n_layer=2, n_head=4, n_embd=32, n_positions=128, vocab_size=512,
            bos_token_id=0, eos_token_id=0, **SHAPES[name],
        )  # fmt: skip
    else:
        config = getattr(transformers, CLASSES[name.split("_")[0]])(
            num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=72,
            max_position_embeddings=128, vocab_size=512,
            **{"num_key_value_heads": 4, "head_dim": 8} | SHAPES[name],
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """theirs(name) -> (model of transformers, the folder it wrote), each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make(name)
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return get


@pytest.fixture
def copy_of(theirs, tmp_path):
    """copy_of(name, **changes to config.json) -> a folder that a test may damage."""

    def copy(name, **changes):
        _, folder = theirs(name)
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return copy
