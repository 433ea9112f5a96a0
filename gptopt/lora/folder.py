"""Adapter folders, as PEFT lays them out: adapter_config.json and adapter_model.safetensors.

`peft.PeftModel.from_pretrained` loads what is written here, where transformers knows the model, and
what PEFT wrote is read as well. Beside PEFT's own facts the safetensors file tells, in its header,
the sha256 of the base's weights: an adapter means nothing on another base. (adapter_config.json has
no place for it: PEFT warns of every key that it does not know.)

The layer of a classifier's labels is trained whole and lies beside the adapter's matrices, as one
of PEFT's modules_to_save; labels.json names them, so that the base may be a plain language model.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptopt import hf
from gptopt.config import MAX_SIZE, LoraOptions
from gptopt.config_classifier import ClassifierConfig, Labelling
from gptopt.errors import UserError, first_line
from gptopt.lora.layers import (
    attach,
    in_any_block,
    lora_modules,
    names_of_layers,
    sites,
    weights_sha256,
)
from gptopt.manifest import read_json, write_json
from gptopt.model import GPT, Classifier, as_classifier
from gptopt.model.lora import Base, LowRank
from gptopt.tensors import write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LABELS = "labels.json"
_BASE = "base_sha256"  # in the header of WEIGHTS
_PREFIX = "base_model.model."  # PEFT's, before every name of the model it stands on
_A, _B = ".lora_A.weight", ".lora_B.weight"
_SHOWN = 5  # names listed in an error

# What PEFT keeps of a model that labels: the second form is its own for any architecture.
_SAVED = (["score"], ["classifier", "score"])
# Keys of PEFT that change what an adapter computes, with the values that do not.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None),
    "lora_bias": (False, None), "modules_to_save": (None, [], *_SAVED), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layer_replication": (None,), "use_qalora": (False, None),
    "use_bdlora": (None, False), "trainable_token_indices": (None,), "target_parameters": (None,),
    "alora_invocation_tokens": (None,), "kasa_config": (None,), "arrow_config": (None,),
    "monteclora_config": (None,), "velora_config": (None,),
}  # fmt: skip


class Adapter(NamedTuple):
    """An adapter folder that was read: what it is, and its matrices by PEFT's names."""

    folder: Path
    options: LoraOptions
    base: Base
    tensors: dict[str, Tensor]
    labelling: Labelling | None = None  # of a classifier's adapter, where labels.json is

    @property
    def score(self) -> Tensor | None:
        """The layer of the labels (L, C); None where the adapter is no classifier's."""
        return self.tensors.get(_PREFIX + hf.SCORE)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def save_adapter(folder: Path, model: GPT, *, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's adapter, and nothing of its base; the caller stages the folder.

    Args:
        folder: an existing folder.
        model: with an adapter whose base is known (`begin`, or a loaded adapter).
        state: its tensors by the names of the model's parameters (None: the model's own).

    Raises:
        OSError: the disk is full, or the folder is not writable.
    """
    assert model.lora is not None
    assert model.base is not None
    assert model.base.sha256 is not None
    named = _named(model)
    held = dict(model.named_parameters()) if state is None else state
    tensors = {name: held[own].detach().contiguous() for name, own in named.items()}
    write_tensors(folder / WEIGHTS, tensors, (_BASE, model.base.sha256))
    write_json(folder / CONFIG, _config(model, model.lora, model.base))
    if isinstance(model, Classifier):
        labelling = model.config.model_dump(include=set(Labelling.model_fields))
        write_json(folder / LABELS, labelling)


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
    adapter = Adapter(folder, options, Base(name or "", told), tensors, _labelling(folder))
    if (adapter.score is None) == bool(adapter.labelling or values.get("modules_to_save")):
        raise UserError(
            f"{folder / WEIGHTS}: the layer of the labels, {_PREFIX}{hf.SCORE}, is "
            f"{'missing' if adapter.score is None else 'there, but modules_to_save lacks it'}; "
            f"copy the adapter again"
        )
    if adapter.score is not None and not (
        adapter.score.ndim == 2 and 0 < len(adapter.score) <= MAX_SIZE
    ):
        raise UserError(
            f"{folder / WEIGHTS}: {_PREFIX}{hf.SCORE} is {list(adapter.score.shape)}, expected a "
            f"row for each label; copy the adapter again"
        )
    return adapter


def _labelling(folder: Path) -> Labelling | None:
    path = folder / LABELS
    if not path.is_file():
        return None
    try:
        return Labelling.model_validate(read_json(path))
    except ValidationError as error:
        raise _invalid(path, error) from None


def put_on(model: GPT, adapter: Adapter) -> GPT:
    """Put a loaded adapter on its base, in place; returns the model.

    Where a classifier's adapter has a plain language model as its base, another model is returned.

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
    if names.pop(hf.SCORE, None) is not None:
        model = _labelled(model, adapter)
    wanted = {name.removesuffix(end) for name in names for end in (_A, _B) if name.endswith(end)}
    known = {part.name for site in sites(model) for part in site.parts}
    if strange := sorted(wanted - known) + [n for n in names if not n.endswith((_A, _B))]:
        raise UserError(
            f"{adapter.folder / WEIGHTS}: holds {', '.join(strange[:_SHOWN])}, which this model "
            f"has no place for; its layers are {', '.join(names_of_layers(model))}"
        )
    attach(model, adapter.options, wanted)
    model.base = Base(adapter.base.name, found)
    _fill(model, adapter, names)
    return model


def _plain(model: GPT, adapter: Adapter) -> dict[str, str]:
    """Names without PEFT's prefix and transformers' -> names as stored."""
    stored = {name.removeprefix(_PREFIX): name for name in adapter.tensors}
    plain = hf.plain_names(hf.architecture_of(model.config), stored)
    return {name: stored[middle] for name, middle in plain.items()}


@torch.no_grad()
def _labelled(model: GPT, adapter: Adapter) -> Classifier:
    """The classifier that an adapter was trained on, with the adapter's layer of labels."""
    score, labelling = adapter.score, adapter.labelling
    assert score is not None
    if labelling is None and isinstance(model.config, ClassifierConfig):
        labelling = model.config
    elif labelling is None:  # PEFT keeps no names; these are transformers'
        labelling = Labelling(labels=[f"LABEL_{at}" for at in range(len(score))])
    if not isinstance(model, Classifier):
        model = as_classifier(model, labelling.of(model.config))
    elif model.config != labelling.of(model.config):
        raise UserError(
            f"{adapter.folder}: labels {', '.join(labelling.labels[:_SHOWN])}, its base labels "
            f"{', '.join(model.config.labels[:_SHOWN])}; they do not belong together"
        )
    model.score.weight.copy_(_checked(adapter, hf.SCORE, score, model.score.weight.shape))
    return model


def _checked(adapter: Adapter, name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor:
    """A matrix of the adapter, which must have this shape and be finite."""
    if tensor is None or tensor.shape != shape:
        found = "missing" if tensor is None else list(tensor.shape)
        raise UserError(
            f"{adapter.folder / WEIGHTS}: {name} is {found}, this model and "
            f"r={adapter.options.rank} ask for {list(shape)}; they do not belong together"
        )
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise UserError(
            f"{adapter.folder / WEIGHTS}: {name} holds what is no finite number; train the adapter "
            f"again"
        )
    return tensor


@torch.no_grad()
def _fill(model: GPT, adapter: Adapter, names: dict[str, str]) -> None:
    for _, module in lora_modules(model):
        for part, a, b in zip(module.parts, module.a, module.b, strict=True):
            for parameter, end in ((a, _A), (b, _B)):
                tensor = adapter.tensors.get(names.get(part.name + end, ""))
                name = part.name + end
                parameter.copy_(_checked(adapter, name, tensor, parameter.shape))


def _named(model: GPT) -> dict[str, str]:
    """The names that PEFT gives the adapter's matrices -> our parameters' names."""
    architecture = hf.architecture_of(model.config)
    labels = isinstance(model, Classifier)
    named: dict[str, str] = {_PREFIX + hf.SCORE: hf.SCORE} if labels else {}
    for name, module in model.named_modules():
        if not isinstance(module, LowRank):
            continue
        for index, part in enumerate(module.parts):
            stored = _PREFIX + hf.stored_name(architecture, part.name)
            named |= {stored + _A: f"{name}.a.{index}", stored + _B: f"{name}.b.{index}"}
    return named


def _config(model: GPT, options: LoraOptions, base: Base) -> dict[str, Any]:
    """adapter_config.json with the keys of PEFT's LoraConfig."""
    alpha = options.scale * options.rank
    labels = isinstance(model, Classifier)
    says_next = "CAUSAL_LM" if model.config.causal else None
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if labels else says_next,
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
        "modules_to_save": _SAVED[0] if labels else None,
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
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(each, str) for each in targets)
    ):
        raise UserError(f"{path}: target_modules is {targets!r}, expected names of layers")
    for key, value in (("r", rank), ("lora_alpha", alpha)):
        if type(value) not in (int, float) or not 0 < value < 2**24:
            raise UserError(f"{path}: {key} is {value!r}, expected a number above 0")
    try:
        if values.get("use_rslora"):  # alpha / sqrt(r): Kalajdzievski 2023, arXiv:2312.03732
            alpha = alpha * rank**0.5
        return LoraOptions(
            rank=rank,
            alpha=alpha,
            dropout=values.get("lora_dropout", 0.0),
            targets=",".join(targets) if isinstance(targets, list) else targets,
        )
    except ValidationError as error:
        raise _invalid(path, error) from None


def _invalid(path: Path, error: ValidationError) -> UserError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return UserError(f"{path}: {where}={first['input']!r}: {first['msg']}")
