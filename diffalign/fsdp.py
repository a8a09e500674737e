"""FSDP2: processes share a network out, with its gradients and the optimiser's states, and each holds a part of every tensor."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def skeleton(network: Any) -> Any:
    """A plain copy whose weights have shapes and no numbers (device meta); its buffers are whole."""
    return copy.deepcopy(network, {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()})


def shard(network: Any, mesh: Any) -> None:
    """Leave of each weight this process's part, in place: they are DTensors then, cut along their first axis.

    A block that diffusers names as one is gathered when it runs and let go after it; what is in none is gathered for the whole call. From
    now on all processes call the network equally often.
    """
    from torch.distributed.fsdp import fully_shard

    names = {name for said in ("_no_split_modules", "_repeated_blocks") for name in getattr(network, said, None) or ()}
    for block in reversed([module for module in network.modules() if type(module).__name__ in names]):  # inner ones first
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)  # else weights would be whole, and others, after a call without a gradient


def twin(plain: Any, network: Any, mesh: Any) -> Any:
    """Another network with the weights of a sharded one, sharded as they are; no process ever holds it whole. `plain` is its skeleton."""
    other = copy.deepcopy(plain)
    shard(other, mesh)
    other.load_state_dict({name: value.detach().clone() for name, value in network.state_dict().items()}, assign=True)
    return other.requires_grad_(False)


def whole(tree: Any) -> Any:
    """Dicts and lists with each sharded tensor in them whole: on the CPU in the first process, None in the others; all must call."""
    from torch.distributed.tensor import DTensor

    if isinstance(tree, DTensor):
        sharded: Any = tree.detach()
        full = sharded.full_tensor()
        return full.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list | tuple) else tree


def part(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, sharded as another of its shape is. Nothing is sent: every process has the whole one."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
