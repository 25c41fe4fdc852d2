"""Initial values of a layer that stands alone; a model has rules of its own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def reset(matrices: Iterable[Tensor], zeros: Iterable[Tensor | None]) -> None:
    """Draw each matrix uniformly within 1/sqrt(fan in), as nn.Linear does, and zero the rest."""
    for matrix in matrices:
        bound = matrix.shape[-1] ** -0.5
        nn.init.uniform_(matrix, -bound, bound)
    for tensor in zeros:
        if tensor is not None:
            nn.init.zeros_(tensor)
