"""AdamW or Muon with decay groups, and the moments as named tensors that safetensors can hold."""

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptopt.config import LoopOptions
from gptopt.errors import CheckFailed
from gptopt.model import GPT
from gptopt.model.block import Block
from gptopt.training.muon import Muon

# One fused kernel per step; it also skips the step on the device when found_inf is set. On a CPU it
# takes a quarter of the time of the foreach form for a small model.
FUSED_DEVICES = ("cpu", "cuda")
_ADAMW_SLOTS = ("step", "exp_avg", "exp_avg_sq")
_MUON_SLOTS = ("momentum",)


def decay_groups(
    model: nn.Module, weight_decay: float, without: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Matrices and embeddings decay; biases and norm weights (fewer than 2 dimensions) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad and p not in without]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: GPT) -> dict[nn.Parameter, tuple[int, ...]]:
    """The blocks' trained matrices, and how many rows each projection in them has.

    Queries, keys and values are three matrices under each other.
    """
    layers = (cast(Block, block).attn for block in model.blocks)
    fused = {layer.qkv.weight: layer.widths for layer in layers}
    return {
        parameter: fused.get(parameter) or (parameter.shape[0],)
        for parameter in model.blocks.parameters()
        if parameter.requires_grad and parameter.ndim == 2
    }


def build_optimiser(model: GPT, options: LoopOptions) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), fused where the device has it.

    With Muon it is left what is no matrix of a block.
    """
    device = next(model.parameters()).device
    hidden = hidden_matrices(model) if options.optimiser == "muon" else {}
    groups = decay_groups(model, options.weight_decay, without=hidden.keys())
    adamw = None
    if groups:
        adamw = torch.optim.AdamW(
            groups,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            fused=device.type in FUSED_DEVICES,
            capturable=options.cuda_graph,
        )
    if hidden:
        return Muon(
            hidden, adamw,
            lr=options.lr, weight_decay=options.weight_decay, momentum=options.momentum,
        )  # fmt: skip
    assert adamw is not None
    return adamw


def _slots(optimiser: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """What is kept of each parameter."""
    return {
        parameter: _MUON_SLOTS if "momentum" in group else _ADAMW_SLOTS
        for group in optimiser.param_groups
        for parameter in group["params"]
    }


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as `slot.parameter` tensors, on the device they are on."""
    slots = _slots(optimiser)
    assert all(state.keys() == set(slots[each]) for each, state in optimiser.state.items())
    tensors = {
        f"{slot}.{name}": optimiser.state[parameter][slot]
        for name, parameter in model.named_parameters()
        if parameter in optimiser.state
        for slot in slots[parameter]
    }
    assert len(tensors) == sum(map(len, optimiser.state.values()))
    return tensors


def empty_optimiser_tensors(
    model: nn.Module, optimiser: torch.optim.Optimizer, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Tensors to read saved state into, laid out and shared out as the parameters are.

    Raises:
        CheckFailed: the saved state does not belong to this model.
    """
    tensors, slots = {}, _slots(optimiser)
    for name, parameter in model.named_parameters():
        for slot in slots.get(parameter, ()):
            if f"{slot}.{name}" in shapes:
                like = torch.zeros(()) if slot == "step" else torch.zeros_like(parameter.detach())
                _compare(f"{slot}.{name}", shapes[f"{slot}.{name}"], like.shape)
                tensors[f"{slot}.{name}"] = like
    _refuse_unknown(shapes.keys() - tensors.keys())
    return tensors


def load_optimiser_tensors(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put saved state back, on each parameter's device.

    Raises:
        CheckFailed: the tensors do not belong to this model.
    """
    optimiser.state.clear()
    names, slots = set(), _slots(optimiser)
    for name, parameter in model.named_parameters():
        kept = slots.get(parameter, ())
        if not any(f"{slot}.{name}" in tensors for slot in kept):
            continue  # a parameter that has not had a gradient yet has no state
        state = optimiser.state[parameter] = {}
        for slot in kept:
            key = f"{slot}.{name}"
            saved = tensors.get(key)
            shape = torch.Size() if slot == "step" else parameter.shape
            _compare(key, None if saved is None else saved.shape, shape)
            assert saved is not None
            # The moments take the parameter's memory layout, as a first step would have made them.
            value = saved if slot == "step" else torch.empty_like(parameter).copy_(saved)
            state[slot] = value.to(parameter.device)
            names.add(key)
    _refuse_unknown(tensors.keys() - names)


def _compare(key: str, found: torch.Size | None, expected: torch.Size) -> None:
    if found != expected:
        raise CheckFailed(
            f"optimizer.safetensors: {key} should have shape {tuple(expected)}, found"
            f" {'nothing' if found is None else tuple(found)}; resume from another checkpoint"
        )


def _refuse_unknown(keys: Collection[str]) -> None:
    if keys:
        raise CheckFailed(
            f"optimizer.safetensors: {min(keys)} belongs to no parameter of this model;"
            f" resume from another checkpoint"
        )
