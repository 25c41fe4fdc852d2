"""The kernel: unfused, so it only computes rows that core's permutation sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard import ExpertWeights, GroupedExperts, Permutation, Workload, activate


class AcmeExperts(GroupedExperts):
    """Computes experts in two batched products over all rows, of which each expert sees only its own."""

    def __init__(self, workload: Workload, permutation: Permutation, chunk: int = 1 << 30):
        super().__init__(workload, permutation)
        self.chunk = chunk  # experts computed at once

    def mlp(self, rows: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
        """Return down(act(up(row))) for each row."""
        index = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets[1:], index, right=True)  # E in the tail
        parts = [
            self._experts(rows, expert, e, weights)
            for e in range(0, weights.up.shape[0], self.chunk)
        ]
        return torch.stack(parts).sum(0)

    def _experts(self, rows: Tensor, expert: Tensor, first: int, weights: ExpertWeights) -> Tensor:
        up, down, up_bias, down_bias = (
            None if w is None else w[first : first + self.chunk] for w in weights
        )
        mine = expert.unsqueeze(0) == torch.arange(
            first, first + up.shape[0], device=rows.device
        ).unsqueeze(1)  # [e, R]
        mine = mine.unsqueeze(-1)
        x = torch.where(
            mine, rows.unsqueeze(0), 0
        )  # [e, R, D]: every expert's own rows, zero elsewhere
        z = x @ up.mT if up_bias is None else x @ up.mT + up_bias.unsqueeze(1)
        y = activate(z, self.workload.activation) @ down.mT
        y = y if down_bias is None else y + down_bias.unsqueeze(1)
        return torch.where(mine, y, 0).sum(0)
