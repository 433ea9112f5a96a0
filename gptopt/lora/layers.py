"""Where an adapter can stand, and putting it there: layers by the names that transformers has.

A GPT-2's q, k and v are one projection to transformers (c_attn) and a llama's are three, so an
adapter made here has the very matrices that PEFT would make, and either can read the other's.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import nn

from gptopt import hf
from gptopt.config import LoraOptions
from gptopt.errors import UserError
from gptopt.model import GPT
from gptopt.model.lora import LowRank, Part

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
    """Put an adapter beside exactly these projections (names of `Part`)."""
    assert options.rank > 0
    if model.lora is not None:
        raise UserError("the model has an adapter already; merge it first, with gptopt merge")
    model.requires_grad_(False)
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
    """What an adapter trains, and nothing else of the model."""
    return [parameter for _, module in lora_modules(model) for parameter in module.parameters()]


@torch.no_grad()
def merge_lora(model: GPT) -> GPT:
    """Add an adapter to the weights it stands beside, in place; the model is then a plain one."""
    for name, module in list(lora_modules(model)):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight += module.update()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own + _SUFFIX, None)
    model.lora, model.lora_dropout = None, 0.0
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
