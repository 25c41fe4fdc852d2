"""MegaBlocks' dropless MoE layer."""

from __future__ import annotations

from torch import Tensor

from tokenyard_models.megablocks.layers import dmlp_registry, mlp, moe
from tokenyard_models.megablocks.layers.arguments import Arguments


class ParallelDroplessMLP(moe.ParallelMLP):
    """The experts, which compute every slot, and the output bias."""

    def _experts(self, args: Arguments) -> mlp.ExpertsMLP:
        return dmlp_registry.get(args)

    def within_capacity(self, ids: Tensor) -> Tensor:
        """Return ids [T, K] as they are."""
        return ids


class dMoE(moe.MoE):
    """A router, dropless experts, and perhaps a shared expert."""

    def _init_experts_mlp(self, args: Arguments) -> moe.ParallelMLP:
        return ParallelDroplessMLP(args)
