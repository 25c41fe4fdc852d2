"""Prefetch of FSDP units: a whole block ahead.

FSDP prefetches one unit by default. A block is two units: its experts, and everything else. The
experts hold nearly all parameters of the block, and the backward pass needs them first, so their
all-gather would overlap with attention alone. Here the whole next block is gathered while a block's
experts compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def set_prefetch(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Let each block prefetch the next one, and in the backward pass the previous one."""
    units_by_block: list[list[Any]] = [
        [unit for unit in block.modules() if isinstance(unit, FSDPModule)] for block in blocks
    ]
    if units_by_block and isinstance(model, FSDPModule):
        model.set_modules_to_forward_prefetch(units_by_block[0])
    for units, next_units in pairwise(units_by_block):
        units[-1].set_modules_to_forward_prefetch(next_units)
        next_units[-1].set_modules_to_backward_prefetch(units)
