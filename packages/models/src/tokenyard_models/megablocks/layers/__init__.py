"""The modules of MegaBlocks' layers."""

from tokenyard_models.megablocks.layers.dmoe import dMoE
from tokenyard_models.megablocks.layers.moe import MoE

__all__ = ["MoE", "dMoE"]
