"""What a rank computes with of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.sharded import local_part


def local_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return this rank's part of a weight, under autocast in the dtype that is computed in."""
    local = local_part(weight)
    return local.to(dtype) if torch.is_autocast_enabled(local.device.type) else local
