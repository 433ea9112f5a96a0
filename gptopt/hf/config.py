"""config.json: Hugging Face's keys for the architectures that we have, both ways.

Our exact configuration always stands under the key "gptopt", so that a folder we wrote is read back
as it was, whatever the other keys can say.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptopt.config import ModelConfig
from gptopt.config_classifier import ClassifierConfig, model_config_of
from gptopt.errors import UserError
from gptopt.hf.architectures import ARCHITECTURES, Architecture

logger = logging.getLogger(__name__)

_CLASSIFIES = "ForSequenceClassification"
OWN = "gptopt"  # our model_type, and the key of our own configuration

# Keys that change the maths of any architecture, with the values that leave it as it is.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None), "auto_map": (None, {}),
    "is_encoder_decoder": (False, None), "pruned_heads": (None, {}),
    "quantization_config": (None, {}),
}  # fmt: skip
_OPTION = {"biased_qkv": "qkv_bias"}  # what a user sets
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
    """What an architecture, such as "gpt2", cannot say of a configuration; empty: it fits."""
    kind = ARCHITECTURES[architecture]
    found = [
        f"{_OPTION.get(name, name)}={getattr(config, name)}"
        for name, values in kind.expresses.items()
        if values and getattr(config, name) not in values
    ]
    if config.biased_qkv != config.bias and len(kind.expresses["biased_qkv"]) > 1:
        found.append(f"qkv_bias={config.qkv_bias} with bias={config.bias}")
    if kind.keys == "gpt2" and config.kv_heads != config.n_head:
        found.append(f"n_kv_head={config.kv_heads}")
    if kind.keys == "gpt2" and config.head_size * config.n_head != config.n_embd:
        found.append(f"head_dim={config.head_size}")
    if kind.keys == "llama" and config.n_embd % config.n_head:
        found.append(f"n_embd={config.n_embd} with n_head={config.n_head}")
    if isinstance(config, ClassifierConfig) and config.pooling != "last":
        found.append(f"pooling={config.pooling}")
    return found


def architecture_of(config: ModelConfig) -> str:
    """The first architecture of transformers that expresses a configuration, or "gptopt"."""
    return next((name for name in ARCHITECTURES if not obstacles(config, name)), OWN)


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
        architecture: one of transformers', or "gptopt"; without it the one that expresses the
            model. Where another one is named, its keys are the nearest ones it has.
        token_ids: bos_token_id, eos_token_id, pad_token_id.
        tokenizer_size: ids that the tokenizer really has; later ids are padding.
        dtype: of the weights beside it.
    """
    architecture = architecture or architecture_of(config)
    own = config.model_dump(mode="json")
    if tokenizer_size is not None:
        own["tokenizer_size"] = tokenizer_size
    known = ARCHITECTURES.get(architecture)
    name = known.class_name if known else "GPT"
    labels = {}
    if isinstance(config, ClassifierConfig):
        name = _classifying(name) if known else "Classifier"
        labels = _label_keys(config)
    head = {"model_type": architecture, "architectures": [name]}
    # transformers fills missing ids with those of the original model, so None is written too.
    ids = {name: (token_ids or {}).get(name) for name in _TOKEN_IDS}
    return head | _their_keys(config, architecture) | labels | ids | {"dtype": dtype, OWN: own}


def _classifying(class_name: str) -> str:
    """GPT2LMHeadModel -> GPT2ForSequenceClassification"""
    return re.sub("LMHeadModel|ForCausalLM", _CLASSIFIES, class_name)


def _label_keys(config: ClassifierConfig) -> dict[str, Any]:
    kind = "multi_label" if config.multi_label else "single_label"
    return {
        "id2label": {str(at): name for at, name in enumerate(config.labels)},
        "label2id": {name: at for at, name in enumerate(config.labels)},
        "problem_type": f"{kind}_classification",
    }


def _classifier(theirs: ModelConfig, raw: Mapping[str, Any], where: Path) -> ModelConfig:
    """A classifier of transformers, which labels the last token and has no head."""
    table = raw.get("id2label")
    count = len(table) if isinstance(table, dict) else 0
    if not isinstance(table, dict) or set(table) != {str(at) for at in range(count)}:
        raise UserError(f"{where}: id2label does not number the labels from 0; restore the file")
    names = [table[str(at)] for at in range(count)]
    several = raw.get("problem_type") == "multi_label_classification"
    shape = theirs.model_dump() | {"tie_head": True}
    return _model_config(shape | {"labels": names, "multi_label": several}, where)


def _their_keys(config: ModelConfig, architecture: str) -> dict[str, Any]:
    both = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_head}
    if architecture == OWN:
        return both
    kind = ARCHITECTURES[architecture]
    names = {ours: theirs for theirs, ours in reversed(list(kind.activations.items()))}
    if kind.keys == "gpt2":
        return both | {
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
            "n_inner": config.ffn_width, "n_positions": config.block_size,
            "activation_function": names.get(config.activation, "gelu_new"),
            "layer_norm_epsilon": config.norm_eps, "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        }  # fmt: skip
    theta = config.rotary_base
    theirs = both | {
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_size,
        "hidden_size": config.n_embd, "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.block_size,
        "hidden_act": names.get(config.activation, "silu"), "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        # transformers 4 reads the first key, transformers 5 the second.
        "rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    }  # fmt: skip
    if "mlp_bias" in kind.used:
        theirs |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    if "sliding_window" in kind.used:
        theirs["sliding_window"] = config.window
    if "use_sliding_window" in kind.used:
        theirs["use_sliding_window"] = False
    return theirs


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
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type is {architecture!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}, {OWN}; other architectures are not supported"
        )
    kind = ARCHITECTURES[architecture]
    _refuse_other_maths(raw, kind, where)
    theirs = (_read_gpt2 if kind.keys == "gpt2" else _read_llama)(raw, kind, where)
    if own is None:
        named = raw.get("architectures") or [""]
        labels = isinstance(named, list) and str(named[0]).endswith(_CLASSIFIES)
        return _classifier(theirs, raw, where) if labels else theirs, architecture
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
        return model_config_of(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        found = f"{place}={first['input']!r}: " if place else ""
        raise UserError(f"{where}: {found}{first['msg']}") from None


def _refuse_other_maths(raw: Mapping[str, Any], kind: Architecture, where: Path) -> None:
    must_be = _MUST_BE | dict(kind.must_be)
    for key, allowed in must_be.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(
                f"{where}: {key}={raw[key]!r} changes what the model computes and is not "
                f"supported; expected {allowed[0]!r}"
            )
    known = must_be.keys() | kind.used | _HARMLESS
    unknown = sorted(
        key
        for key, value in raw.items()
        if key not in known
        and not key.startswith(_HARMLESS_PREFIXES)
        and value not in (None, False)
    )
    if unknown:
        # transformers' own model of this type reads none of them.
        logger.warning("%s: keys not known for %s are ignored: %s", where, kind.name, unknown[:10])


def _activation(raw: Mapping[str, Any], key: str, kind: Architecture, where: Path) -> str:
    name = raw.get(key, next(iter(kind.activations)))
    if not isinstance(name, str) or name not in kind.activations:
        raise UserError(
            f"{where}: {key}={name!r} is not supported; expected one of {list(kind.activations)}"
        )
    return kind.activations[name]


def _read_gpt2(raw: Mapping[str, Any], kind: Architecture, where: Path) -> ModelConfig:
    """Missing keys mean what they mean to transformers."""
    raw = {**kind.defaults, **raw}
    dropouts = [raw.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if any(each != dropouts[0] for each in dropouts):
        logger.warning(
            "%s: one dropout for all is supported; resid_pdrop=%s is used", where, dropouts[0]
        )
    return _model_config(
        {
            "n_layer": raw["n_layer"], "n_head": raw["n_head"], "n_embd": raw["n_embd"],
            "n_inner": raw.get("n_inner"), "block_size": raw["n_positions"],
            "vocab_size": raw["vocab_size"],
            "activation": _activation(raw, "activation_function", kind, where),
            "norm_eps": raw.get("layer_norm_epsilon", 1e-5), "dropout": dropouts[0],
            "tie_head": raw.get("tie_word_embeddings", True), "position": "learned",
        },
        where,
    )  # fmt: skip


def _read_llama(raw: Mapping[str, Any], kind: Architecture, where: Path) -> ModelConfig:
    """Missing keys mean what they mean to transformers."""
    raw = {**kind.defaults, **raw}
    bias = raw.get("attention_bias", False)
    if raw.get("mlp_bias", False) != bias:
        raise UserError(
            f"{where}: attention_bias={bias} and mlp_bias={not bias} are not supported; "
            f"expected both or none"
        )
    for key in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if key in kind.used and raw.get(key):
            logger.warning("%s: %s is not used; set dropout to train with it", where, key)
    qkv_bias = True if kind.expresses["biased_qkv"] == {True} else None
    return _model_config(
        {
            "n_layer": raw["num_hidden_layers"], "n_head": raw["num_attention_heads"],
            "n_kv_head": raw["num_key_value_heads"], "head_dim": raw["head_dim"],
            "n_embd": raw["hidden_size"], "n_inner": raw["intermediate_size"],
            "block_size": raw["max_position_embeddings"], "vocab_size": raw["vocab_size"],
            "bias": bias, "qkv_bias": qkv_bias, "qk_norm": kind.expresses["qk_norm"] == {True},
            "activation": _activation(raw, "hidden_act", kind, where), "norm": "rmsnorm",
            "norm_eps": raw["rms_norm_eps"], "position": "rotary",
            "rotary_base": _rope_theta(raw, where), "tie_head": raw["tie_word_embeddings"],
            "window": _window(raw, kind, where),
        },
        where,
    )  # fmt: skip


def _window(raw: Mapping[str, Any], kind: Architecture, where: Path) -> Any:
    """The sliding window of all layers; some architectures could give each layer its own."""
    if "sliding_window" not in kind.used:
        return None
    if "use_sliding_window" not in kind.used:
        return raw["sliding_window"]
    layers = raw["num_hidden_layers"]
    types = raw.get("layer_types")
    if types is None and raw.get("use_sliding_window") and isinstance(layers, int):
        first = raw.get("max_window_layers", 28)
        types = ["full_attention" if at < first else "sliding_attention" for at in range(layers)]
    if types and any(each != "full_attention" for each in types):
        raise UserError(
            f"{where}: use_sliding_window: layers with a window in a {kind.name} are not "
            f"supported; expected full attention in all"
        )
    return None


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
