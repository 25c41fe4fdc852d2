"""The `local` exchange: every rank holds all experts, so no token moves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenyard.interfaces import Compute, Permutation, Routing
from tokenyard.workload import Workload


class LocalExchange:
    """Computes tokens on the experts of this rank."""

    rows_per_token = 0.0

    def __init__(self, workload: Workload, permutation: Permutation, group: Any = None):
        pass

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """Return y [T, D] for x [T, D], computed on this rank."""
        return compute(x, routing.topk_ids, routing.topk_weights)
