"""How a model is spread over ranks: copied whole (DDP) or in parts (FSDP2), and what follows."""

import contextlib
import functools
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint

from gptopt.model import GPT
from gptopt.training.distributed import World


def shard(model: GPT, device: torch.device, dtype: torch.dtype, world: World) -> GPT:
    """Give each rank its part of every block and of what is outside them, filled from rank 0.

    The blocks' weights are gathered in `dtype`, in which autocast would multiply them anyway; the
    embeddings and the residual stream stay in fp32, and gradients are summed in it.

    Args:
        model: whole, on the CPU; on ranks other than 0 it may be on the meta device.
        device: of this rank.
        dtype: the autocast precision.
        world: the ranks.

    Source: Zhao et al. 2023, arXiv:2304.11277.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    # Blocks hand on keys and values as views; nobody writes into them while training.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world.size,))
    source = {name: weight.detach() for name, weight in model.named_parameters()}
    model.to("meta")
    narrow = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(None, torch.float32 if narrow else None, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy if narrow else wide)
    fully_shard(model, mesh=mesh, mp_policy=wide, reshard_after_forward=False)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = cast(DTensor, parameter)
            full = torch.empty(part.shape, dtype=part.dtype, device=device)
            if world.is_first:
                full.copy_(source[name])
            part.copy_(distribute_tensor(full, part.device_mesh, part.placements))
    return model


def replicate(model: GPT, world: World) -> nn.Module:
    """What a forward pass calls: it arranges for the gradients' mean over the ranks."""
    if world.parallel != "ddp":
        return model
    from torch.nn.parallel import DistributedDataParallel

    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def reducing(module: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Around one micro-batch: gradients cross the ranks with the last one of a step only."""
    if hasattr(module, "no_sync"):
        return contextlib.nullcontext() if now else module.no_sync()  # type: ignore[operator]  # DDP's
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(now)  # type: ignore[operator]  # FSDP's
    return contextlib.nullcontext()


def gather_no_more(model: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward pass has gathered.

    While they are gathered, the model's parameters are not those that the optimiser knows.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]  # FSDP's


def checkpoint_activations(model: GPT) -> None:
    """Keep what enters each block only; the backward pass computes the rest again.

    Dropout draws from seeds that are arguments, so the second pass repeats the first.
    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    for block in model.blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm () of all gradients together, over all ranks that hold a part of them."""
    return whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))


def whole(tensor: Tensor) -> Tensor:
    """A tensor that ranks hold in parts, gathered; any other as it is. All ranks must call it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of it where it is not shared out."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """All of a tensor of which each rank has that part that it has of `like`."""
    if not hasattr(like, "full_tensor"):
        return part
    from torch.distributed.tensor import DTensor

    shared = cast(DTensor, like)
    return DTensor.from_local(
        part, shared.device_mesh, shared.placements,
        run_check=False, shape=shared.shape, stride=shared.stride(),
    ).full_tensor()  # fmt: skip


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor, whole on every rank, that this rank has of `like`."""
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    shared = cast(DTensor, like)
    mine = distribute_tensor(full, shared.device_mesh, shared.placements, src_data_rank=None)
    return mine.to_local()
