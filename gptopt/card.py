"""README.md of a model folder: what the model is, how to use it, and what its maker adds."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptopt import hf
from gptopt.config_classifier import labels_of, says_next
from gptopt.model import GPT
from gptopt.model.lora import LowRank

if TYPE_CHECKING:
    from gptopt.config import ModelConfig
    from gptopt.tokenizer import Tokenizer

CARD = "README.md"
HERE = "THIS_FOLDER"
_SHOWN_LABELS = 10


def model_card(
    model: GPT,
    tokenizer: "Tokenizer | None",
    extra: str | None = None,
    *,
    name: str | None = None,
    front: Mapping[str, Any] | None = None,
    folder: str = HERE,
) -> str:
    """README.md as the Hub reads it: front matter in YAML, then Markdown.

    Args:
        model: a model, or one with an adapter (LoRA), whose folder holds the adapter alone.
        tokenizer: the folder's.
        extra: Markdown that follows the facts.
        name: what the title calls it.
        front: keys of the front matter beside those that the model decides.
        folder: how examples call the model folder.
    """
    config = model.config
    architecture = hf.architecture_of(config)
    known = architecture != hf.OWN
    library = "peft" if model.lora else "transformers" if known else "gptopt"
    keys = {
        "library_name": library if known else "gptopt",
        "pipeline_tag": task_of(config),
        **(front or {}),
        "tags": ["gptopt", *(["lora"] if model.lora else [])],
    }
    what = "An adapter for a GPT" if model.lora else "A GPT"
    if name:
        what = f"{code(name)}: {what[0].lower()}{what[1:]}"
    parts = [
        f"---\n{_yaml(keys)}---",
        f"# {what} of {_rounded(_base_size(model))} parameters",
        f"{_kind(config)}. Made with gptopt: {_shape(config)}; "
        f"{config.norm_position}-{config.norm}, {config.activation}, {config.position} positions.",
        _adapter(model) if model.lora else _loading(config, architecture),
        "## Use\n\n" + _usage(model, tokenizer, known, folder),
    ]
    return "\n\n".join([*parts, extra.strip()] if extra else parts) + "\n"


def task_of(config: "ModelConfig") -> str:
    """What the Hub calls the task."""
    if labels_of(config) is not None:
        return "text-classification"
    return "text-generation" if config.causal else "fill-mask"


def code(text: object) -> str:
    """Any text on one line of Markdown, as it is."""
    return "`" + " ".join(str(text).split()).replace("`", "'") + "`"


def table(rows: Mapping[str, Any]) -> str:
    """Two columns without a head."""
    lines = (f"| {name} | {cell(value)} |" for name, value in rows.items())
    return "| | |\n|---|---|\n" + "\n".join(lines)


def cell(text: str) -> str:
    """What stands in a table, where a bar would end it."""
    return text.replace("|", "\\|")


def _kind(config: "ModelConfig") -> str:
    labels = labels_of(config)
    if labels is None:
        return "It continues text" if config.causal else "It guesses masked tokens of a text"
    shown = ", ".join(map(code, labels[:_SHOWN_LABELS]))
    more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
    return f"It labels text: {shown}{more}"


def _shape(config: "ModelConfig") -> str:
    names = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size")
    values = ((name, getattr(config, name)) for name in names)
    return ", ".join(f"{name} {value}" for name, value in values if value is not None)


def _loading(config: "ModelConfig", architecture: str) -> str:
    if architecture != hf.OWN:
        return (
            f"It is a `{architecture}` model: `transformers.{_auto(config)}.from_pretrained` loads "
            f"this folder, and so does `gptopt.load_model`."
        )
    reasons = min((hf.obstacles(config, name) for name in hf.ARCHITECTURES), key=len)
    return (
        f"transformers has no architecture for it ({', '.join(reasons)}): it is loaded by "
        f"`gptopt.load_model` only. Its configuration is config.json, key `gptopt`."
    )


def _auto(config: "ModelConfig") -> str:
    classifies = labels_of(config) is not None
    return "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"


def _adapter(model: GPT) -> str:
    assert model.lora is not None
    size, labels = model.num_parameters() - _base_size(model), labels_of(model.config)
    whole = f" and the layer of {len(labels)} labels" if labels else ""
    base = model.base
    told = "" if base is None else f" The base is {code(short(base.name))}"
    told += f", whose weights have the sha256 `{base.sha256}`." if base and base.sha256 else ""
    return (
        f"The folder holds the adapter alone, {size:,} numbers of rank {model.lora.rank}, "
        f"alpha {model.lora.scale * model.lora.rank:g}, on {code(model.lora.targets)}{whole}, as "
        f"PEFT lays it out.{told} It means nothing on any other base, and gptopt refuses that."
    )


def short(name: str) -> str:
    """A model's name without where it lies on a disk: the folder's own, of a run with its step."""
    parts = Path(name).parts
    if not Path(name).is_absolute():
        return name
    return "/".join(parts[-3:] if "checkpoints" in parts[-2:-1] else parts[-1:])


def _usage(model: GPT, tokenizer: "Tokenizer | None", known: bool, folder: str) -> str:
    config, prompt = model.config, "some text"
    if says_next(config):
        prompt = "Once upon a time"
    elif labels_of(config) is None and tokenizer is not None and tokenizer.mask_id is not None:
        prompt = f"Once upon a {tokenizer.decode([tokenizer.mask_id], skip_special=False)}"
    beside = f"BASE --adapter {folder}" if model.lora else folder
    lines = [f'gptopt generate {beside} --prompt "{prompt}"']
    if tokenizer is not None and tokenizer.chat_template and says_next(config):
        lines = [f"gptopt chat {beside}"]
    exported, switched = folder, ""
    if model.lora and labels_of(config) is None:
        exported, switched = f"BASE --adapter mine={folder}", " --adapter mine"
    elif model.lora:  # one graph has no place for several layers of labels
        lines.append(f"gptopt merge {beside} --out merged")
        exported = "merged"
    lines.append(f"gptopt export {exported} --out edge")
    lines.append(f'gptopt run edge{switched} --prompt "{prompt}"')
    return f"```\n{chr(10).join(lines)}\n```\n\n```python\n{_python(model, known, folder)}\n```"


def _python(model: GPT, known: bool, folder: str) -> str:
    auto, base = _auto(model.config), "BASE" if model.lora else folder
    labels = labels_of(model.config)
    shape = f", num_labels={len(labels)}" if labels and model.lora else ""
    if not known:
        given = '"BASE", adapter=' if model.lora else ""
        return (
            f'from gptopt import load_model\n\nmodel, tokenizer, _ = load_model({given}"{folder}")'
        )
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        f'model = {auto}.from_pretrained("{base}"{shape})',
    ]
    if model.lora:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'model = PeftModel.from_pretrained(model, "{folder}")')
    return "\n".join(lines)


def _base_size(model: GPT) -> int:
    """Parameters without an adapter's."""
    adapters = (module for module in model.modules() if isinstance(module, LowRank))
    return model.num_parameters() - sum(p.numel() for each in adapters for p in each.parameters())


def _rounded(count: int) -> str:
    """A count with three digits and a unit: 124 M."""
    power = min(int(math.log10(max(count, 1))) // 3, 3)
    return f"{count / 1000**power:.3g}{('', ' k', ' M', ' G')[power]}"


def _yaml(value: Any, indent: str = "") -> str:
    """Nested dicts and lists as YAML; scalars as JSON, which is YAML too, plain where it can be."""
    lines = ""
    if isinstance(value, Mapping):
        for key, each in value.items():
            nested = isinstance(each, Mapping | list)
            inside = indent + ("" if isinstance(each, list) else "  ")
            lines += f"{indent}{key}:" + (
                f"\n{_yaml(each, inside)}" if nested else f" {_scalar(each)}\n"
            )
        return lines
    for each in value:
        if isinstance(each, Mapping):
            lines += f"{indent}- {_yaml(each, indent + '  ').lstrip()}"
        else:
            lines += f"{indent}- {_scalar(each)}\n"
    return lines


def _scalar(value: Any) -> str:
    plain = isinstance(value, str) and value.replace("-", "").replace("_", "").isalpha()
    return value if plain and value.isascii() else json.dumps(value, ensure_ascii=False)
