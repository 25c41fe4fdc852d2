"""How much of a sharded model is gathered at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tokenyard import moe_layers
from tokenyard_parallel.meshes import EXPERT_PARALLEL

_AT_ONCE = 2  # blocks: the one that is computed, and the next, whose parameters are on their way


def working_set(model: nn.Module, reshard_after_forward: bool) -> int:
    """Return the bytes that a step holds at most of gathered parameters, and of gradients not yet scattered.

    What is not in a block is gathered all the while. Of the blocks, two are at a time, or all if they are kept from the
    forward to the backward pass. One unit's gradients stand whole twice, in the dtype that they are computed in.
    """
    units = [_Unit(module, model) for module in model.modules() if isinstance(module, FSDPModule)]
    within = [_block_of(unit.module, getattr(model, "blocks", ())) for unit in units]
    blocks: dict[int, int] = {}
    for unit, block in zip(units, within):
        if block is not None:
            blocks[block] = blocks.get(block, 0) + unit.gathered
    outside = sum(unit.gathered for unit, block in zip(units, within) if block is None)
    at_once = (
        sorted(blocks.values())[-_AT_ONCE:] if reshard_after_forward else list(blocks.values())
    )
    return outside + sum(at_once) + max((unit.gradients for unit in units), default=0)


class _Unit:
    """One FSDP unit: its own parameters, without those of units inside it."""

    def __init__(self, module: nn.Module, model: nn.Module):
        self.module = module
        inner = {
            p
            for m in module.modules()
            if m is not module and isinstance(m, FSDPModule)
            for p in m.parameters()
        }
        own = [p for p in module.parameters() if p not in inner]
        computed = {
            p: moe.workload.dtype for moe in moe_layers(model) for p in moe.experts.parameters()
        }
        self.gathered = sum(_numbers(p) * _narrower(p.dtype, computed.get(p)).itemsize for p in own)
        trained = [p for p in own if p.requires_grad]
        self.gradients = sum(
            2 * _numbers(p) * _narrower(p.dtype, computed.get(p)).itemsize for p in trained
        )


def _block_of(module: nn.Module, blocks: Iterable[nn.Module]) -> int | None:
    return next(
        (i for i, block in enumerate(blocks) if any(m is module for m in block.modules())), None
    )


def _numbers(parameter: nn.Parameter) -> int:
    """Return how many numbers a rank has of a parameter that was gathered: the experts of other ranks are not."""
    if not isinstance(parameter, DTensor) or EXPERT_PARALLEL not in (
        parameter.device_mesh.mesh_dim_names or ()
    ):
        return parameter.numel()
    return parameter.numel() // parameter.device_mesh[EXPERT_PARALLEL].size()


def _narrower(stored: torch.dtype, computed: torch.dtype | None) -> torch.dtype:
    return computed if computed is not None and computed.itemsize < stored.itemsize else stored
