"""What transformers' architectures are called and can say, as data.

A decoder of another family is one more entry here: its keys in config.json, what they can express
of a `ModelConfig`, and where its weights stand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A model_type of transformers.

    Attributes:
        name: its model_type.
        class_name: its class for causal language models.
        keys: whose names config.json uses: gpt2's, or those of llama and all that followed it.
        expresses: field of ModelConfig -> the values that it can say.
        defaults: what transformers takes where a key is missing.
        activations: their name -> ours; the first of each is the one that is written.
        must_be: keys that change the maths, with the values that leave it as it is.
        used: further keys that are read.
        modules: our module -> theirs, whose rows follow each other; or, where one of theirs holds
            several of ours, our modules joined by "+" -> it.
        blocks: name of the list of blocks.
        prefix: what stands before every weight but the head's.
        buffers: stored tensors that are no weights.
    """

    name: str
    class_name: str
    keys: Literal["gpt2", "llama"]
    expresses: Mapping[str, set[Any]]
    defaults: Mapping[str, Any]
    activations: Mapping[str, str]
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    modules: Mapping[str, tuple[str, ...]]
    blocks: str
    prefix: str
    buffers: re.Pattern[str]


_PLAIN: dict[str, set[Any]] = {
    "norm_position": {"pre"}, "causal": {True}, "attn_softcap": {None}, "logit_softcap": {None},
}  # fmt: skip

_GPT2 = Architecture(
    name="gpt2", class_name="GPT2LMHeadModel", keys="gpt2",
    expresses=_PLAIN | {
        "position": {"learned"}, "norm": {"layernorm"}, "bias": {True}, "biased_qkv": {True},
        "activation": {"gelu_tanh", "gelu", "relu", "relu2"}, "qk_norm": {False},
        "window": {None},
    },
    defaults={
        "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257,
    },
    activations={
        "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
        "gelu": "gelu", "relu": "relu", "relu2": "relu2",
    },
    must_be={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    used=frozenset({
        "activation_function", "attn_pdrop", "embd_pdrop", "layer_norm_epsilon", "n_embd",
        "n_head", "n_inner", "n_layer", "n_positions", "resid_pdrop", "tie_word_embeddings",
        "vocab_size",
    }),
    modules={
        "wte": ("wte",), "wpe": ("wpe",), "norm": ("ln_f",), "head": ("lm_head",),
        "norm_1": ("ln_1",), "norm_2": ("ln_2",),
        "attn.qkv": ("attn.c_attn",), "attn.proj": ("attn.c_proj",),
        "ffn.up": ("mlp.c_fc",), "ffn.down": ("mlp.c_proj",),
    },
    blocks="h", prefix="transformer.",
    buffers=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
)  # fmt: skip

_LLAMA_KEYS = frozenset({
    "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
    "vocab_size",
})  # fmt: skip
_LLAMA_MODULES: dict[str, tuple[str, ...]] = {
    "wte": ("embed_tokens",), "norm": ("norm",), "head": ("lm_head",),
    "norm_1": ("input_layernorm",), "norm_2": ("post_attention_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "attn.q_norm": ("self_attn.q_norm",), "attn.k_norm": ("self_attn.k_norm",),
    # Theirs is named after the gate that is activated; our `up` is the activated one.
    "ffn.up": ("mlp.gate_proj",), "ffn.gate": ("mlp.up_proj",), "ffn.down": ("mlp.down_proj",),
}  # fmt: skip
_LLAMA_DEFAULTS = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048,
    "vocab_size": 32000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "sliding_window": None, "head_dim": None,
}  # fmt: skip


def _like_llama(
    name: str,
    class_name: str,
    *,
    says: Mapping[str, set[Any]],
    defaults: Mapping[str, Any],
    must_be: Mapping[str, tuple[Any, ...]] | None = None,
    used: tuple[str, ...] = (),
    modules: Mapping[str, tuple[str, ...]] = _LLAMA_MODULES,
) -> Architecture:
    expresses = _PLAIN | {
        "position": {"rotary"}, "norm": {"rmsnorm"}, "rotary_interleaved": {False},
        "activation": {"swiglu", "geglu"}, "qk_norm": {False}, "window": {None},
        "bias": {False}, "biased_qkv": {False},
    }  # fmt: skip
    return Architecture(
        name=name, class_name=class_name, keys="llama", expresses=expresses | dict(says),
        defaults=_LLAMA_DEFAULTS | dict(defaults),
        activations={"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"},
        must_be={"partial_rotary_factor": (None, 1.0)} | dict(must_be or {}),
        used=_LLAMA_KEYS | set(used), modules=modules, blocks="layers", prefix="model.",
        buffers=re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    )  # fmt: skip


_ANY_WINDOW: set[Any] = set()  # an empty set: any value

# In the order in which a model of ours looks for one that expresses it.
ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        _GPT2,
        _like_llama(
            "llama", "LlamaForCausalLM",
            says={"bias": {False, True}, "biased_qkv": {False, True}}, defaults={},
            used=("attention_bias", "mlp_bias"),
        ),
        _like_llama(
            "mistral", "MistralForCausalLM", says={"window": _ANY_WINDOW},
            defaults={
                "num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096,
                "max_position_embeddings": 131072,
            },
            used=("sliding_window",),
        ),
        _like_llama(
            "qwen2", "Qwen2ForCausalLM", says={"biased_qkv": {True}},
            defaults={
                "num_key_value_heads": 32, "intermediate_size": 22016, "vocab_size": 151936,
                "max_position_embeddings": 32768,
            },
            used=("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
        ),
        _like_llama(
            "qwen3", "Qwen3ForCausalLM", says={"qk_norm": {True}},
            defaults={
                "num_key_value_heads": 32, "intermediate_size": 22016, "vocab_size": 151936,
                "max_position_embeddings": 32768, "head_dim": 128,
            },
            must_be={"attention_bias": (False,)},
            used=("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
        ),
        # Read only: llama and mistral say the same, and come first.
        _like_llama(
            "phi3", "Phi3ForCausalLM", says={"window": _ANY_WINDOW},
            defaults={
                "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32064,
                "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            },
            used=("embd_pdrop", "original_max_position_embeddings", "resid_pdrop",
                  "sliding_window"),
            modules=_LLAMA_MODULES | {
                "attn.qkv": ("self_attn.qkv_proj",), "ffn.up+ffn.gate": ("mlp.gate_up_proj",),
            },
        ),
    )
}  # fmt: skip
