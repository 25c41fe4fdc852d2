"""Find weights that are not finite, and those that a cast to another dtype would make infinite."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard_models.hf._folder import WeightsError


def check_cast(tensor: Tensor, dtype: torch.dtype, what: str, instead: str) -> bool:
    """Return whether all values are finite.

    Raises WeightsError if they are, and some of them are infinite in `dtype`. The sentence starts
    with `what` and ends with `instead`.
    """
    if not tensor.numel():
        return True
    extremes = torch.stack(torch.aminmax(tensor))  # nan if any value is
    if not extremes.isfinite().all():
        return False
    if not extremes.to(dtype).isfinite().all():
        name = str(dtype).removeprefix("torch.")
        largest = extremes.abs().max().item()
        raise WeightsError(
            f"{what} has values up to {largest:.4g}, which are infinite in {name}; {instead}"
        )
    return True
