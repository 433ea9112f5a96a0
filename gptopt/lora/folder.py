"""Adapter folders, as PEFT lays them out: adapter_config.json and adapter_model.safetensors.

`peft.PeftModel.from_pretrained` loads what is written here, where transformers knows the model, and
what PEFT wrote is read as well. Beside PEFT's own facts the safetensors file tells, in its header,
the sha256 of the base's weights: an adapter means nothing on another base. (adapter_config.json has
no place for it: PEFT warns of every key that it does not know.)
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptopt import hf
from gptopt.config import LoraOptions
from gptopt.errors import UserError, first_line
from gptopt.lora.layers import attach, in_any_block, lora_modules, names_of_layers, sites
from gptopt.manifest import read_json, write_json
from gptopt.model import GPT

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_BASE = "base_sha256"  # in the header of WEIGHTS
_PREFIX = "base_model.model."  # PEFT's, before every name of the model it stands on
_A, _B = ".lora_A.weight", ".lora_B.weight"
_SHOWN = 5  # names listed in an error

# Keys of PEFT that change what an adapter computes, with the values that do not.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None),
    "lora_bias": (False, None), "modules_to_save": (None, []), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layer_replication": (None,), "use_qalora": (False, None),
    "use_bdlora": (None, False), "trainable_token_indices": (None,), "target_parameters": (None,),
    "alora_invocation_tokens": (None,), "kasa_config": (None,), "arrow_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,),
}  # fmt: skip


class Base(NamedTuple):
    """The model that an adapter stands on.

    Attributes:
        name: its folder, or its name on the hub, as PEFT's base_model_name_or_path has it.
        sha256: of its weights; None where an adapter does not tell.
    """

    name: str
    sha256: str | None


class Adapter(NamedTuple):
    """An adapter folder that was read: what it is, and its matrices by PEFT's names."""

    folder: Path
    options: LoraOptions
    base: Base
    tensors: dict[str, Tensor]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(model: GPT, folder: Path | str) -> Base:
    """A model as a base: its folder, absolute, and the sha256 of its weights."""
    return Base(str(Path(folder).resolve()), weights_sha256(model))


def weights_sha256(model: GPT) -> str:
    """sha256 of a model's own weights, in float32, whatever files they lay in.

    Names and shapes are part of it; what LoRA put beside the weights is not.
    """
    adapter = {id(p) for _, module in lora_modules(model) for p in module.parameters()}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) in adapter:
            continue
        array = parameter.detach().float().cpu().contiguous().numpy()
        digest.update(f"{name} {list(array.shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def save_adapter(folder: Path, model: GPT, base: Base) -> None:
    """Write a model's adapter, and nothing of its base; the caller stages the folder.

    Args:
        folder: an existing folder.
        model: with an adapter (`gptopt.lora.apply_lora`).
        base: what it stands on.

    Raises:
        OSError: the disk is full, or the folder is not writable.
    """
    assert model.lora is not None
    assert base.sha256 is not None
    tensors = {name: value.detach().contiguous() for name, value in _named(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", _BASE: base.sha256})
    write_json(folder / CONFIG, _config(model, model.lora, base))


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter folder of ours or of PEFT's.

    Raises:
        UserError: a file is missing or malformed, or it is an adapter of another kind than LoRA.
    """
    values = read_json(folder / CONFIG)
    for key, allowed in _MUST_BE.items():
        if key in values and values[key] not in allowed:
            raise UserError(
                f"{folder / CONFIG}: {key}={values[key]!r} changes what the adapter computes and "
                f"is not supported; expected {allowed[0]!r}"
            )
    options = _options(values, folder / CONFIG)
    name = values.get("base_model_name_or_path")
    if not isinstance(name, str | None):
        raise UserError(f"{folder / CONFIG}: base_model_name_or_path is {name!r}, expected a name")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            told = (file.metadata() or {}).get(_BASE)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{folder / WEIGHTS}: not readable as safetensors ({first_line(error)}); copy the "
            f"adapter again"
        ) from None
    return Adapter(folder, options, Base(name or "", told), tensors)


def put_on(model: GPT, adapter: Adapter) -> GPT:
    """Put a loaded adapter on its base, in place; returns the model.

    Raises:
        UserError: it was trained on another base, or its matrices do not fit this one.
    """
    told, found = adapter.base.sha256, weights_sha256(model)
    if told is not None and told != found:
        raise UserError(
            f"{adapter.folder}: was trained on another base: its weights have the sha256 "
            f"{told[:12]}, this model's have {found[:12]}; give the base that it was trained on"
            + (f", {adapter.base.name}" if adapter.base.name else "")
        )
    names = _plain(model, adapter)
    wanted = {name.removesuffix(end) for name in names for end in (_A, _B) if name.endswith(end)}
    known = {part.name for site in sites(model) for part in site.parts}
    if strange := sorted(wanted - known) + [n for n in names if not n.endswith((_A, _B))]:
        raise UserError(
            f"{adapter.folder / WEIGHTS}: holds {', '.join(strange[:_SHOWN])}, which this model "
            f"has no place for; its layers are {', '.join(names_of_layers(model))}"
        )
    attach(model, adapter.options, wanted)
    _fill(model, adapter, names)
    return model


def _plain(model: GPT, adapter: Adapter) -> dict[str, str]:
    """Names without PEFT's prefix and transformers' -> names as stored."""
    stored = {name.removeprefix(_PREFIX): name for name in adapter.tensors}
    plain = hf.plain_names(hf.architecture_of(model.config), stored)
    return {name: stored[middle] for name, middle in plain.items()}


@torch.no_grad()
def _fill(model: GPT, adapter: Adapter, names: dict[str, str]) -> None:
    for _, module in lora_modules(model):
        for part, a, b in zip(module.parts, module.a, module.b, strict=True):
            for parameter, end in ((a, _A), (b, _B)):
                tensor = adapter.tensors.get(names.get(part.name + end, ""))
                if tensor is None or tensor.shape != parameter.shape:
                    found = "missing" if tensor is None else list(tensor.shape)
                    raise UserError(
                        f"{adapter.folder / WEIGHTS}: {part.name}{end} is {found}, this model and "
                        f"r={adapter.options.rank} ask for {list(parameter.shape)}; they do not "
                        f"belong together"
                    )
                if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                    raise UserError(
                        f"{adapter.folder / WEIGHTS}: {part.name}{end} holds what is no finite "
                        f"number; train the adapter again"
                    )
                parameter.copy_(tensor)


def _named(model: GPT) -> dict[str, Tensor]:
    """The adapter's matrices by the names that PEFT gives them."""
    architecture = hf.architecture_of(model.config)
    named: dict[str, Tensor] = {}
    for _, module in lora_modules(model):
        for part, a, b in zip(module.parts, module.a, module.b, strict=True):
            stored = _PREFIX + hf.stored_name(architecture, part.name)
            named |= {stored + _A: a, stored + _B: b}
    return named


def _config(model: GPT, options: LoraOptions, base: Base) -> dict[str, Any]:
    """adapter_config.json with the keys of PEFT's LoraConfig."""
    alpha = options.scale * options.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.config.causal else None,
        "base_model_name_or_path": base.name,
        "revision": None,
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": options.dropout,
        "target_modules": _targets(model),
        "bias": "none",
        # Says that the base stores its matrices as (in, out), not how the adapter's lie.
        "fan_in_fan_out": hf.architecture_of(model.config) == "gpt2",
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def _targets(model: GPT) -> list[str]:
    """The adapted projections by the ends of their names; in full where some blocks have none."""
    names = [part.name for _, module in lora_modules(model) for part in module.parts]
    blocks = Counter(in_any_block(name) for name in names)
    ends = (in_any_block(name) for name in names)
    pairs = zip(names, ends, strict=True)
    return list(dict.fromkeys(e if blocks[e] == model.n_layer else name for name, e in pairs))


def _options(values: dict[str, Any], path: Path) -> LoraOptions:
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    targets = values.get("target_modules") or []
    try:
        if values.get("use_rslora"):  # alpha / sqrt(r): Kalajdzievski 2023, arXiv:2312.03732
            alpha = alpha * rank**0.5
        options = LoraOptions(
            rank=rank,
            alpha=alpha,
            dropout=values.get("lora_dropout", 0.0),
            targets=",".join(targets) if isinstance(targets, list) else str(targets),
        )
    except (ValidationError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a LoRA configuration ({_first(error)})") from None
    if options.rank == 0:
        raise UserError(f"{path}: r is 0, expected the rank of the adapter")
    return options


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return first_line(error)
    detail = error.errors()[0]
    return f"{'.'.join(map(str, detail['loc']))}={json.dumps(detail['input'])}: {detail['msg']}"
