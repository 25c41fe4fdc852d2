"""When the units of a sharded model are gathered.

By itself FSDP gathers one unit ahead. A block is two units, all of it but its experts, and the experts, which hold
nearly all of its parameters and are the first to be needed in its backward pass: their gathering would be hidden behind
the attention's computation at best. So the whole of the next block is gathered while a block's experts compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def gather_ahead(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Let each sharded block's last unit gather the units of the block after it, and backward of the one before it."""
    each: list[list[Any]] = [
        [unit for unit in block.modules() if isinstance(unit, FSDPModule)] for block in blocks
    ]
    if each and isinstance(model, FSDPModule):
        model.set_modules_to_forward_prefetch(each[0])
    for units, following in pairwise(each):
        units[-1].set_modules_to_forward_prefetch(following)
        following[-1].set_modules_to_backward_prefetch(units)
