"""The files of an exported folder that other clients read: nothing hostile, and what they need.

onnxruntime-genai opens whatever file genai_config.json names and loads whatever library it names;
transformers runs the code that `auto_map` names. This runtime reads neither, but a folder that it
accepted is taken for a good one, so it looks.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptopt.config import ModelConfig
from gptopt.errors import CheckFailed
from gptopt.manifest import read_json
from gptopt.runtime.variants import edge_files

GENAI = "genai_config.json"
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", GENAI)
_RUNS_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
_PLAIN = re.compile(r"[A-Za-z0-9_.,%+-]{0,200}")
_LARGEST = 2**40
# Classes and types that the clients' older versions know, too.
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
_MODEL_TYPES = ("gpt2", "llama", "gemma")
_SIZES = {
    "head_size": "decoder.head_size", "n_embd": "decoder.hidden_size",
    "n_head": "decoder.num_attention_heads", "n_layer": "decoder.num_hidden_layers",
    "kv_heads": "decoder.num_key_value_heads", "vocab_size": "vocab_size",
    "block_size": "context_length",
}  # fmt: skip


def refuse_hostile(folder: Path) -> None:
    """Refuse names of code and of files elsewhere in what other clients read.

    Raises:
        UserError: a file is not readable as JSON.
        CheckFailed: it names code to run, a file that is not the folder's, or a number beyond all
            sizes.
    """
    for name in _JSON_FILES:
        path = folder / name
        if not path.is_file():
            continue
        values = read_json(path)
        for key in _RUNS_CODE:
            if key in values:
                raise CheckFailed(f"{path}: names code to run ({key}); export the model again")
        if name == GENAI:
            _check_genai(path, values, {file.file for file in edge_files(folder).values()})


def _check_genai(path: Path, values: dict[str, Any], files: set[str]) -> None:
    for where, value in _leaves(values):
        if where.endswith(".filename"):
            if value not in files:
                raise _wrong(path, where, value, f"one of {', '.join(sorted(files))}")
        elif isinstance(value, str) and (".." in value or not _PLAIN.fullmatch(value)):
            raise _wrong(path, where, value, "a plain word")
        elif isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
            raise _wrong(path, where, value, "a size")


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is neither an object nor a list, and its place; keys count as well."""
    waiting = [("", value)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{where}.{key}", each) for key, each in value.items()]
            yield from ((f"{where}, key", key) for key in value)
        elif isinstance(value, list):
            waiting += [(f"{where}[{index}]", each) for index, each in enumerate(value)]
        else:
            yield where, value


def check_client_files(folder: Path, model: ModelConfig) -> None:
    """Hold a folder to what other clients need, and are known to fail without.

    Args:
        folder: the exported folder.
        model: what it was exported from.

    Raises:
        CheckFailed: a client would refuse the folder, or understand it wrongly.
    """
    config = folder / "config.json"
    values = read_json(config)
    files = edge_files(folder)
    if (found := values.get("model_type")) not in _MODEL_TYPES:
        raise _wrong(config, "model_type", found, f"one of {', '.join(_MODEL_TYPES)}")
    names = [Path(file.file).name for file in files.values()]
    wanted = {name: 1 for name in names if (folder / "onnx" / f"{name}_data").is_file()}
    js = values.get("transformers.js_config", {})
    if (found := js.get("use_external_data_format", {})) != wanted:
        where = "transformers.js_config.use_external_data_format"
        raise _wrong(config, where, found, wanted)
    _check_tokenizer(folder)
    if (folder / GENAI).is_file():
        genai = read_json(folder / GENAI)
        first = next(iter(files.values()))
        expected: dict[str, Any] = {where: getattr(model, key) for key, where in _SIZES.items()}
        expected |= {"type": "decoder", "decoder.filename": first.file}
        for where, want in expected.items():
            _same(folder / GENAI, genai, f"model.{where}", want)
        shared = first.cache != "growing"
        _same(folder / GENAI, genai, "search.past_present_share_buffer", shared)


def _check_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file():
        return
    values = read_json(path)
    _same(path, values, "tokenizer_class", _TOKENIZER_CLASS)
    template = folder / "chat_template.jinja"
    if template.is_file():
        text = template.read_text(encoding="utf-8")
        if values.get("chat_template") != text:
            raise CheckFailed(
                f"{path}: its chat_template is not that of chat_template.jinja, and some clients "
                f"read the one, some the other; export the model again"
            )


def _same(path: Path, values: Any, where: str, wanted: Any) -> None:
    found = values
    for key in where.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    if found != wanted or type(found) is not type(wanted):
        raise _wrong(path, where, found, wanted)


def _wrong(path: Path, where: str, found: Any, wanted: Any) -> CheckFailed:
    shown = repr(found)[:80]
    if isinstance(found, float) and not math.isfinite(found):
        shown = str(found)
    return CheckFailed(
        f"{path}: {where.lstrip('.')[:120]} is {shown}, expected {wanted}; export the model again"
    )
