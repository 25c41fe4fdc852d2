"""What a rank computes with of a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return this rank's part of a weight, under autocast in the dtype that is computed in."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return local.to(dtype) if torch.is_autocast_enabled(local.device.type) else local
