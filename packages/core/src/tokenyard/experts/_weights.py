"""The weights that a rank computes with."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.sharded import local_part


def local_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the local shard of a weight; under autocast, cast to the compute `dtype`."""
    local = local_part(weight)
    return local.to(dtype) if torch.is_autocast_enabled(local.device.type) else local
