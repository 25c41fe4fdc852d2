"""Weights that hold several matrices, such as queries, keys and values in one projection.

A module that owns such weights has an attribute `fused_rows`: a mapping of a weight's name,
relative to the module, to the number of rows of each matrix. The matrices follow each other along
the last dimension but one. An optimizer such as Muon treats them one by one.
"""

from __future__ import annotations

from torch import nn


def fused_rows(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the rows of each matrix of a weight, by parameter name, for weights that have them."""
    return {
        f"{prefix}.{name}".lstrip("."): tuple(rows)
        for prefix, module in model.named_modules()
        for name, rows in getattr(module, "fused_rows", {}).items()
    }
