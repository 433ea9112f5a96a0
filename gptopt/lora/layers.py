"""Where an adapter can stand, and putting it there: layers by the names that transformers has.

A GPT-2's q, k and v are one projection to transformers (c_attn) and a llama's are three, so an
adapter made here has the very matrices that PEFT would make, and either can read the other's.
"""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gptopt import hf
from gptopt.config import LoraOptions
from gptopt.errors import UserError
from gptopt.model import GPT, Classifier
from gptopt.model.lora import Base, LowRank, Part

# Groups of --lora.targets -> our modules of a block.
_GROUPS = {"attention": ("attn.qkv", "attn.proj"), "ffn": ("ffn.up", "ffn.gate", "ffn.down")}
_SUFFIX = "_lora"  # blocks.0.attn.qkv -> blocks.0.attn.qkv_lora


class Site(NamedTuple):
    """A linear layer of a block, by our name, and the projections that lie in it."""

    module: str
    parts: list[Part]


def sites(model: GPT) -> list[Site]:
    """Every layer that an adapter can stand beside."""
    ours = {own for group in _GROUPS.values() for own in group}
    architecture = hf.architecture_of(model.config)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or _in_block(name) not in ours:
            continue
        weight = f"{name}.weight"
        (stored,) = hf.weights(model.config, architecture, {weight: module.weight.shape})
        parts, start = [], 0
        for part, rows in zip(stored.parts, stored.rows, strict=True):
            parts.append(Part(part.removesuffix(".weight"), start, rows))
            start += rows
        found.append(Site(name, parts))
    return found


def names_of_layers(model: GPT) -> list[str]:
    """What --lora.targets may name, each once: the projections of any block, and the groups."""
    names = (in_any_block(part.name) for site in sites(model) for part in site.parts)
    return [*dict.fromkeys(names), *_GROUPS]


def apply_lora(model: GPT, options: LoraOptions) -> GPT:
    """Freeze a model and put an untrained adapter on it, in place; returns the model.

    Its output stays the same, bit for bit, until the adapter is trained.

    Raises:
        UserError: a layer is named that the model does not have, or it has an adapter already.
    """
    wanted = _chosen(model, options)
    attach(model, options, wanted)
    return model


def attach(model: GPT, options: LoraOptions, wanted: Collection[str]) -> None:
    """Put an adapter beside exactly these projections (names of `Part`).

    A classifier's labels are learned with it, in full.
    """
    assert options.rank > 0
    if model.lora is not None:
        raise UserError("the model has an adapter already; merge it first, with gptopt merge")
    model.requires_grad_(False)
    if isinstance(model, Classifier):
        model.score.requires_grad_(True)
    number = 0
    for site in sites(model):
        parts = [part for part in site.parts if part.name in wanted]
        if not parts:
            continue
        parent, _, name = site.module.rpartition(".")
        layer = model.get_submodule(site.module)
        assert isinstance(layer, nn.Linear)
        adapter = LowRank(
            layer, parts, rank=options.rank, scale=options.scale, dropout_p=options.dropout,
            number=number,
        )  # fmt: skip
        setattr(model.get_submodule(parent), name + _SUFFIX, adapter)
        number += 1
    model.lora, model.lora_dropout = options, options.dropout


def lora_modules(model: GPT) -> Iterator[tuple[str, LowRank]]:
    """Each part of the adapter, with our name of the layer that it stands beside."""
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            yield name.removesuffix(_SUFFIX), module


def lora_parameters(model: GPT) -> list[nn.Parameter]:
    """The matrices of an adapter, and nothing else of the model."""
    return [parameter for _, module in lora_modules(model) for parameter in module.parameters()]


def begin(
    model: GPT, options: LoraOptions, start: GPT | None = None, folder: Path | None = None
) -> GPT:
    """Give a fresh model the weights that a run starts with, and the adapter it asks for.

    Args:
        model: a plain one, of the start's shape; changed in place and returned.
        options: of the adapter; rank 0 is none, and an adapter of the start is then merged.
        start: the model to start from, with or without an adapter, which is then trained on.
        folder: where the start's base lies.

    Raises:
        UserError: an adapter without a model to adapt, or another one than the start has.
    """
    if start is None or folder is None:
        if options.rank:
            raise UserError(
                f"--lora.rank {options.rank}: LoRA adapts a trained model; name it with --init-from"
            )
        return model
    if start.lora is not None and not options.rank:
        start = merge_lora(start)
    if start.lora is not None:
        _refuse_other_adapter(model, options, start)
        apply_lora(model, options)
    # Copied, so that weights from any file lie in memory as a fresh model's do: the layout decides
    # how a product rounds, and a resumed run repeats every bit.
    model.load_state_dict(start.state_dict())
    if options.rank and start.lora is None:
        apply_lora(model, options)
    if options.rank:
        model.base = start.base or base_of(model, folder)
    return model


def base_of(model: GPT, folder: Path) -> Base:
    """A model, and where it lies, as the base of adapters."""
    return Base(str(folder.resolve()), weights_sha256(model))


def _refuse_other_adapter(model: GPT, options: LoraOptions, start: GPT) -> None:
    assert start.lora is not None
    there = {part.name for _, module in lora_modules(start) for part in module.parts}
    same = (options.rank, options.scale) == (start.lora.rank, start.lora.scale)
    if not same or there != _chosen(model, options):
        raise UserError(
            f"--lora.rank {options.rank}: the model to start from has an adapter of rank "
            f"{start.lora.rank}, alpha {start.lora.scale * start.lora.rank:g} on "
            f"{start.lora.targets}; ask for the same, or merge it first, with gptopt merge"
        )


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


@torch.no_grad()
def merge_lora(model: GPT) -> GPT:
    """Add an adapter to the weights it stands beside, in place; the model is then a plain one."""
    for name, module in list(lora_modules(model)):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight += module.update()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own + _SUFFIX, None)
    model.lora, model.lora_dropout, model.base = None, 0.0, None
    return model.requires_grad_(True)


def _chosen(model: GPT, options: LoraOptions) -> set[str]:
    asked = [name.strip() for name in options.targets.split(",") if name.strip()]
    everywhere = sites(model)
    chosen: set[str] = set()
    for target in asked:
        if target in _GROUPS:
            matching = [
                part for site in everywhere if _in_block(site.module) in _GROUPS[target]
                for part in site.parts
            ]  # fmt: skip
        else:
            matching = [
                part for site in everywhere for part in site.parts
                if f".{part.name}".endswith(f".{target}")
            ]  # fmt: skip
        if not matching:
            raise UserError(
                f"--lora.targets {target}: the model has no such layer; it has "
                f"{', '.join(names_of_layers(model))}"
            )
        chosen.update(part.name for part in matching)
    if not chosen:
        raise UserError(
            f"--lora.targets: names no layer; the model has {', '.join(names_of_layers(model))}"
        )
    return chosen


def _in_block(module: str) -> str:
    """blocks.3.attn.qkv -> attn.qkv"""
    return module.split(".", 2)[2] if module.startswith("blocks.") else module


def in_any_block(name: str) -> str:
    """h.3.attn.c_attn -> attn.c_attn"""
    before, _, rest = name.partition(".")
    while not before.isdecimal():
        before, _, rest = rest.partition(".")
    return rest
