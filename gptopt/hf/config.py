"""config.json: Hugging Face's keys for gpt2 and llama models, both ways.

Our exact configuration always stands under the key "gptopt", so that a folder we wrote is read back
as it was, whatever the other keys can say.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptopt.config import ModelConfig
from gptopt.errors import UserError

logger = logging.getLogger(__name__)

OWN = "gptopt"  # our model_type, and the key of our own configuration

_PLAIN: dict[str, set[Any]] = {
    "norm_position": {"pre"}, "qk_norm": {False}, "causal": {True}, "window": {None},
    "attn_softcap": {None}, "logit_softcap": {None},
}  # fmt: skip
# What an architecture can say: field of ModelConfig -> values.
_EXPRESSES: dict[str, dict[str, set[Any]]] = {
    "gpt2": _PLAIN | {
        "position": {"learned"}, "norm": {"layernorm"}, "bias": {True},
        "activation": {"gelu_tanh", "gelu", "relu", "relu2"},
    },
    "llama": _PLAIN | {
        "position": {"rotary"}, "norm": {"rmsnorm"}, "rotary_interleaved": {False},
        "activation": {"swiglu", "geglu"},
    },
}  # fmt: skip
_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}

# The first name of each is the one that is written.
_ACTIVATIONS: dict[str, dict[str, str]] = {
    "gpt2": {
        "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
        "gelu": "gelu", "relu": "relu", "relu2": "relu2",
    },
    "llama": {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"},
}  # fmt: skip

# Keys that change the maths, with the values that leave it as it is; any other value is an error.
_MUST_BE: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "add_cross_attention": (False, None), "auto_map": (None, {}),
        "is_encoder_decoder": (False, None), "pruned_heads": (None, {}),
        "quantization_config": (None, {}),
    },
    "gpt2": {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    "llama": {"partial_rotary_factor": (None, 1.0)},
}  # fmt: skip

_USED = {
    "gpt2": {
        "activation_function", "attn_pdrop", "embd_pdrop", "layer_norm_epsilon", "n_embd",
        "n_head", "n_inner", "n_layer", "n_positions", "resid_pdrop", "tie_word_embeddings",
        "vocab_size",
    },
    "llama": {
        "attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size",
        "intermediate_size", "max_position_embeddings", "mlp_bias", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
        "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
    },
}  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TRAINING_ONLY = {"attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"}
_HARMLESS = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "label2id", "model_type", "n_ctx", "name_or_path",
    "num_labels", "output_attentions", "output_hidden_states", "output_past", "pad_token_id",
    "predict_special_tokens", "prefix", "pretraining_tp", "problem_type",
    "reorder_and_upcast_attn", "return_dict", "sep_token_id", "task_specific_params",
    "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unk_token_id", "use_bfloat16",
    "use_cache", OWN,
}  # fmt: skip
_HARMLESS_PREFIXES = ("_", "summary_")


def obstacles(config: ModelConfig, architecture: str) -> list[str]:
    """What this architecture ("gpt2" or "llama") cannot say of a configuration; empty: it fits."""
    found = [
        f"{field}={getattr(config, field)}"
        for field, values in _EXPRESSES[architecture].items()
        if getattr(config, field) not in values
    ]
    if architecture == "gpt2" and config.kv_heads != config.n_head:
        found.append(f"n_kv_head={config.kv_heads}")
    if architecture == "gpt2" and config.head_size * config.n_head != config.n_embd:
        found.append(f"head_dim={config.head_size}")
    if architecture == "llama" and config.n_embd % config.n_head:
        found.append(f"n_embd={config.n_embd} with n_head={config.n_head}")
    return found


def architecture_of(config: ModelConfig) -> str:
    """The architecture of transformers that expresses a configuration, or "gptopt"."""
    return next((name for name in _EXPRESSES if not obstacles(config, name)), OWN)


def config_to_json(
    config: ModelConfig,
    *,
    architecture: str | None = None,
    token_ids: Mapping[str, int | None] | None = None,
    tokenizer_size: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """config.json of a model folder.

    Args:
        config: the model.
        architecture: "gpt2", "llama" or "gptopt"; without it the one that expresses the model.
            Where another one is named, its keys are the nearest ones it has.
        token_ids: bos_token_id, eos_token_id, pad_token_id.
        tokenizer_size: ids that the tokenizer really has; later ids are padding.
        dtype: of the weights beside it.
    """
    architecture = architecture or architecture_of(config)
    own = config.model_dump(mode="json")
    if tokenizer_size is not None:
        own["tokenizer_size"] = tokenizer_size
    head = {"model_type": architecture, "architectures": [_CLASSES.get(architecture, "GPT")]}
    # transformers fills missing ids with those of the original model, so None is written too.
    ids = {name: (token_ids or {}).get(name) for name in _TOKEN_IDS}
    return head | _their_keys(config, architecture) | ids | {"dtype": dtype, OWN: own}


def _their_keys(config: ModelConfig, architecture: str) -> dict[str, Any]:
    both = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_head}
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.get(architecture, {}).items())}
    if architecture == "gpt2":
        return both | {
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
            "n_inner": config.ffn_width, "n_positions": config.block_size,
            "activation_function": names.get(config.activation, "gelu_new"),
            "layer_norm_epsilon": config.norm_eps, "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        }  # fmt: skip
    if architecture == "llama":
        theta = config.rotary_base
        return both | {
            "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_size,
            "hidden_size": config.n_embd, "intermediate_size": config.ffn_width,
            "max_position_embeddings": config.block_size,
            "hidden_act": names.get(config.activation, "silu"), "rms_norm_eps": config.norm_eps,
            "attention_bias": config.bias, "mlp_bias": config.bias,
            "attention_dropout": config.dropout,
            # transformers 4 reads the first key, transformers 5 the second.
            "rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        }  # fmt: skip
    return both


def config_from_json(raw: Mapping[str, Any], where: Path) -> tuple[ModelConfig, str]:
    """The configuration in a config.json, and the architecture whose weight names go with it.

    Raises:
        UserError: another architecture, a key that changes the maths in a way we do not have, or
            our own configuration under "gptopt" contradicts the other keys.
    """
    architecture = raw.get("model_type")
    own = _own_config(raw[OWN], where) if OWN in raw else None
    if architecture == OWN and own is not None:
        return own, OWN
    if not isinstance(architecture, str) or architecture not in _USED:
        raise UserError(
            f"{where}: model_type is {architecture!r}, expected gpt2, llama or gptopt; "
            f"other architectures are not supported"
        )
    _refuse_other_maths(raw, architecture, where)
    theirs = _read_gpt2(raw, where) if architecture == "gpt2" else _read_llama(raw, where)
    if own is None:
        return theirs, architecture
    stated, implied = _their_keys(theirs, architecture), _their_keys(own, architecture)
    for key in sorted(stated.keys() - _TRAINING_ONLY):
        if stated[key] != implied[key]:
            raise UserError(
                f"{where}: {key}={stated[key]} contradicts {implied[key]} under the key {OWN!r}; "
                f"remove that key if the file was changed on purpose"
            )
    return own, architecture


def _own_config(section: Any, where: Path) -> ModelConfig:
    if not isinstance(section, dict):
        raise UserError(f"{where}: expected an object under {OWN!r}, found {section!r}")
    values = {key: value for key, value in section.items() if key != "tokenizer_size"}
    return _model_config(values, where)


def _model_config(values: dict[str, Any], where: Path) -> ModelConfig:
    if values.get("vocab_size") is None:
        raise UserError(f"{where}: vocab_size is missing; restore the file")
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        found = f"{place}={first['input']!r}: " if place else ""
        raise UserError(f"{where}: {found}{first['msg']}") from None


def _refuse_other_maths(raw: Mapping[str, Any], architecture: str, where: Path) -> None:
    must_be = _MUST_BE[""] | _MUST_BE[architecture]
    for key, allowed in must_be.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(
                f"{where}: {key}={raw[key]!r} changes what the model computes and is not "
                f"supported; expected {allowed[0]!r}"
            )
    known = must_be.keys() | _USED[architecture] | _HARMLESS
    unknown = sorted(
        key
        for key, value in raw.items()
        if key not in known
        and not key.startswith(_HARMLESS_PREFIXES)
        and value not in (None, False)
    )
    if unknown:
        # transformers' own model of this type reads none of them.
        logger.warning(
            "%s: keys not known for %s are ignored: %s", where, architecture, unknown[:10]
        )


def _activation(raw: Mapping[str, Any], key: str, default: str, kind: str, where: Path) -> str:
    name = raw.get(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS[kind]:
        raise UserError(
            f"{where}: {key}={name!r} is not supported; expected one of {list(_ACTIVATIONS[kind])}"
        )
    return _ACTIVATIONS[kind][name]


def _read_gpt2(raw: Mapping[str, Any], where: Path) -> ModelConfig:
    """Missing keys mean what they mean to transformers."""
    dropouts = [raw.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if len(set(dropouts)) > 1:
        logger.warning(
            "%s: one dropout for all is supported; resid_pdrop=%s is used", where, dropouts[0]
        )
    return _model_config(
        {
            "n_layer": raw.get("n_layer", 12), "n_head": raw.get("n_head", 12),
            "n_embd": raw.get("n_embd", 768), "n_inner": raw.get("n_inner"),
            "block_size": raw.get("n_positions", 1024), "vocab_size": raw.get("vocab_size", 50257),
            "activation": _activation(raw, "activation_function", "gelu_new", "gpt2", where),
            "norm_eps": raw.get("layer_norm_epsilon", 1e-5), "dropout": dropouts[0],
            "tie_head": raw.get("tie_word_embeddings", True), "position": "learned",
        },
        where,
    )  # fmt: skip


def _read_llama(raw: Mapping[str, Any], where: Path) -> ModelConfig:
    """Missing keys mean what they mean to transformers."""
    bias = raw.get("attention_bias", False)
    if raw.get("mlp_bias", False) != bias:
        raise UserError(
            f"{where}: attention_bias={bias} and mlp_bias={not bias} are not supported; "
            f"expected both or none"
        )
    if raw.get("attention_dropout"):
        logger.warning("%s: attention_dropout is not used; set dropout to train with it", where)
    return _model_config(
        {
            "n_layer": raw.get("num_hidden_layers", 32),
            "n_head": raw.get("num_attention_heads", 32),
            "n_kv_head": raw.get("num_key_value_heads"), "head_dim": raw.get("head_dim"),
            "n_embd": raw.get("hidden_size", 4096), "n_inner": raw.get("intermediate_size", 11008),
            "block_size": raw.get("max_position_embeddings", 2048),
            "vocab_size": raw.get("vocab_size", 32000), "bias": bias,
            "activation": _activation(raw, "hidden_act", "silu", "llama", where),
            "norm": "rmsnorm", "norm_eps": raw.get("rms_norm_eps", 1e-6), "position": "rotary",
            "rotary_base": _rope_theta(raw, where),
            "tie_head": raw.get("tie_word_embeddings", False),
        },
        where,
    )  # fmt: skip


def _rope_theta(raw: Mapping[str, Any], where: Path) -> Any:
    """The rotary base, from the old keys rope_theta and rope_scaling or the new rope_parameters."""
    thetas = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        table = raw.get(key) or {}
        if not isinstance(table, dict):
            raise UserError(f"{where}: {key}: expected an object, found {table!r}")
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default" or table.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"{where}: {key}={table} changes what the model computes and is not supported; "
                f"expected rope_type 'default'"
            )
        if "rope_theta" in table:
            thetas.append(table["rope_theta"])
    if any(theta != thetas[0] for theta in thetas):
        raise UserError(f"{where}: the keys give different values of rope_theta: {thetas}")
    return thetas[0] if thetas else 10000.0
