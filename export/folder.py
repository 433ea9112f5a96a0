"""The files of an exported folder that are not graphs; what each client reads is said with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptopt import hf
from gptopt.config import ModelConfig
from gptopt.config_classifier import says_next
from gptopt.manifest import write_json
from gptopt.runtime.variants import EdgeFile

if TYPE_CHECKING:
    from gptopt.tokenizer import Tokenizer

_JS_TYPES = ("fp32", "fp16", "q8", "q4", "q4f16", "q2")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One ONNX file of a folder: its precision, what is known of it, where its weights lie."""

    precision: str
    facts: EdgeFile
    external: bool


def write_configs(
    folder: Path,
    config: ModelConfig,
    tokenizer: "Tokenizer | None",
    target: str,
    files: Sequence[GraphFile],
    adapters: Sequence[str] = (),
) -> None:
    """config.json, generation_config.json, genai_config.json and the tokenizer's files."""
    ids: Mapping[str, int] = {}
    if tokenizer is not None:
        tokenizer.save(folder, model_max_length=config.block_size)
        ids = dict(
            zip(_TOKEN_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True)
        )
    edge = {
        "target": target,
        "files": {file.precision: file.facts.model_dump() for file in files},
    }
    if adapters:
        edge["adapters"] = list(adapters)
    values = _hf_config(config, tokenizer, ids)
    values |= {"transformers.js_config": _js_config(files), "gptopt_edge": edge}
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", dict(ids))
    if tokenizer is not None and says_next(config):
        write_json(folder / "genai_config.json", _genai_config(config, ids, files[0].facts))


def _hf_config(
    config: ModelConfig, tokenizer: "Tokenizer | None", ids: Mapping[str, int]
) -> dict[str, Any]:
    """config.json with a model_type that clients know.

    transformers.js and optimum read no more from it than the names and sizes of the cache, and they
    refuse types they have never heard of, so a model that is neither a gpt2 nor a llama declares
    the nearest one. What the model really is stands under "gptopt".
    """
    architecture = hf.architecture_of(config)
    if architecture not in ("gpt2", "llama"):
        plain = config.kv_heads == config.n_head and config.head_dim in (
            None,
            config.n_embd // config.n_head,
        )
        architecture = "gpt2" if plain else "llama"
    size = config.vocab_size if tokenizer is None else tokenizer.size
    values = hf.config_to_json(
        config, architecture=architecture, token_ids=ids, tokenizer_size=size
    )
    if config.head_size * config.n_head != config.n_embd:
        # The same names as a llama's, but optimum-onnx takes the width of a head from head_dim.
        values["model_type"] = "gemma"
    return values


def _js_config(files: Sequence[GraphFile]) -> dict[str, Any]:
    """transformers.js: which file, and which ones have weights beside them, by their full names.

    In a browser it would ask for a quantised file by default. It knows a file by the name that it
    gives its type; the others are for clients that name the file itself.
    """
    known = [file.precision for file in files if file.precision in _JS_TYPES]
    js: dict[str, Any] = {"dtype": known[0]} if known else {}
    if beside := {Path(file.facts.file).name: 1 for file in files if file.external}:
        js["use_external_data_format"] = beside
    return js


def _genai_config(config: ModelConfig, ids: Mapping[str, int], file: EdgeFile) -> dict[str, Any]:
    """genai_config.json. onnxruntime-genai refuses keys it does not know, so there are no others.

    The type is `decoder`: `gpt2` selects a class with another form of cache.
    """
    return {
        "model": {
            "type": "decoder",
            **ids,
            "vocab_size": config.vocab_size,
            "context_length": config.block_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file.file,
                "head_size": config.head_size,
                "hidden_size": config.n_embd,
                "num_attention_heads": config.n_head,
                "num_hidden_layers": config.n_layer,
                "num_key_value_heads": config.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": config.block_size,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": file.cache != "growing",
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
