"""An unfused kernel: it computes rows that core's permutation sorts by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard import ExpertWeights, GroupedExperts, Permutation, Workload, activate


class AcmeExperts(GroupedExperts):
    """Computes experts with batched matmuls over all rows, masked for each expert."""

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
        """Return [R, D]: rows of the experts from `first` on, zero for the rows of others."""
        up, down, up_bias, down_bias = (
            None if w is None else w[first : first + self.chunk] for w in weights
        )
        ids = torch.arange(first, first + up.shape[0], device=rows.device)  # [e]
        mask = (expert.unsqueeze(0) == ids.unsqueeze(1)).unsqueeze(-1)  # [e, R, 1]
        x = torch.where(mask, rows.unsqueeze(0), 0)  # [e, R, D]
        z = x @ up.mT if up_bias is None else x @ up.mT + up_bias.unsqueeze(1)  # [e, R, 2F or F]
        y = activate(z, self.workload.activation) @ down.mT  # [e, R, D]
        y = y if down_bias is None else y + down_bias.unsqueeze(1)
        return torch.where(mask, y, 0).sum(0)
