"""Default initial values of a single layer. A model initialises its layers by its own rules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def reset(matrices: Iterable[Tensor], zeros: Iterable[Tensor | None]) -> None:
    """Draw each matrix from U(-b, b) with b = 1/sqrt(fan in), as nn.Linear does; fill `zeros`."""
    for matrix in matrices:
        bound = matrix.shape[-1] ** -0.5
        nn.init.uniform_(matrix, -bound, bound)
    for tensor in zeros:
        if tensor is not None:
            nn.init.zeros_(tensor)
