"""Peak memory of gathered parameters and unreduced gradients in a sharded model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tokenyard import moe_layers
from tokenyard_parallel.meshes import EXPERT_PARALLEL, SHARD, is_shard

_GATHERED_BLOCKS = 2  # the block that computes, and the next one, which is prefetched
_CONVERTED_UNITS = 2  # whose regions take turns


def working_set(model: nn.Module, reshard_after_forward: bool, copies: bool = False) -> int:
    """Return the peak bytes of gathered parameters and of gradients before their reduce-scatter.

    Parameters outside of blocks stay gathered for the whole step. Of the blocks, two are gathered
    at a time, or all of them if they are not resharded after the forward pass. The gradients of one
    unit exist twice at full size, in their compute dtype. If experts are gathered by `copies`,
    shards that are stored in a wider dtype are converted into memory for the shards of two units.
    """
    units = [_Unit(module, model) for module in model.modules() if isinstance(module, FSDPModule)]
    outside = 0
    by_block: dict[int, int] = {}
    for unit in units:
        block = _block_index(unit.module, getattr(model, "blocks", ()))
        if block is None:
            outside += unit.gathered
        else:
            by_block[block] = by_block.get(block, 0) + unit.gathered
    blocks = sorted(by_block.values())
    gathered_blocks = blocks[-_GATHERED_BLOCKS:] if reshard_after_forward else blocks
    gradients = max((unit.gradients for unit in units), default=0)
    converted = max((unit.converted for unit in units), default=0) if copies else 0
    return outside + sum(gathered_blocks) + gradients + _CONVERTED_UNITS * converted


class _Unit:
    """The bytes of one FSDP unit, without the units nested in it.

    `gathered` are those of its parameters, `gradients` those of their gradients, twice, and
    `converted` those of this rank's shards that are gathered in a narrower dtype.
    """

    def __init__(self, module: nn.Module, model: nn.Module):
        self.module = module
        nested = {
            parameter
            for child in module.modules()
            if child is not module and isinstance(child, FSDPModule)
            for parameter in child.parameters()
        }
        compute_dtypes = {
            parameter: moe.workload.dtype
            for moe in moe_layers(model)
            for parameter in moe.experts.parameters()
        }
        self.gathered = 0
        self.gradients = 0
        self.converted = 0
        for parameter in module.parameters():
            if parameter in nested or not _is_gathered(parameter):
                continue
            dtype = _narrower(parameter.dtype, compute_dtypes.get(parameter))
            gathered = _gathered_numel(parameter) * dtype.itemsize
            self.gathered += gathered
            if dtype != parameter.dtype:
                self.converted += gathered // _shards(parameter)
            if parameter.requires_grad:
                self.gradients += 2 * gathered


def _is_gathered(parameter: nn.Parameter) -> bool:
    """Return False for experts that no other rank has: they are on a mesh of their own."""
    return not isinstance(parameter, DTensor) or (
        parameter.device_mesh.mesh_dim_names != (EXPERT_PARALLEL,)
    )


def _block_index(module: nn.Module, blocks: Iterable[nn.Module]) -> int | None:
    for index, block in enumerate(blocks):
        if any(child is module for child in block.modules()):
            return index
    return None


def _gathered_numel(parameter: nn.Parameter) -> int:
    """Return the numel of a gathered parameter; experts of other ranks are not gathered."""
    if not isinstance(parameter, DTensor) or EXPERT_PARALLEL not in (
        parameter.device_mesh.mesh_dim_names or ()
    ):
        return parameter.numel()
    return parameter.numel() // parameter.device_mesh[EXPERT_PARALLEL].size()


def _shards(parameter: nn.Parameter) -> int:
    if not isinstance(parameter, DTensor) or not is_shard(parameter):
        return 1
    size: int = parameter.device_mesh[SHARD].size()
    return size


def _narrower(stored: torch.dtype, computed: torch.dtype | None) -> torch.dtype:
    return computed if computed is not None and computed.itemsize < stored.itemsize else stored
