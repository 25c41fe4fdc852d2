"""Gated experts and the gated shared expert in MegaBlocks' layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.interfaces import ExpertWeights
from tokenyard_models.megablocks.layers.arguments import Arguments
from tokenyard_models.megablocks.layers.mlp import SharedMLP, SparseMLP


class SparseGLU(SparseMLP):
    """Gated experts of dMoE: w1 (gate), v1 and w2, each [E F, D]."""

    def __init__(self, args: Arguments):
        super().__init__(args)
        self.v1 = self._weight(args.init_method)

    def expert_weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in tokenyard's layout."""
        up = torch.cat([self.stacked(self.w1, dtype), self.stacked(self.v1, dtype)], dim=1)
        down = self.stacked(self.w2, dtype).transpose(1, 2).contiguous()
        return ExpertWeights(up, down)


class GroupedGLU(SparseGLU):
    """The same as SparseGLU, by its other name."""


class SharedGLU(SharedMLP):
    """The gated shared expert: gate_proj, up_proj and down_proj."""

    def __init__(self, args: Arguments):
        super().__init__(args)
        width = args.shared_expert_hidden_size
        self.gate_proj = args.fc_cls(args.hidden_size, width, **self.fc_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, shaped like x [..., D]."""
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y
