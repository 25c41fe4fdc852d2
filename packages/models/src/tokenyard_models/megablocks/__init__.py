"""MegaBlocks' Python API on the backends of tokenyard, for scripts where MegaBlocks is absent.

`install` makes ``import megablocks`` find this package. Names, parameters and layouts are those of
MegaBlocks 0.10 (Gale et al. 2023, arXiv 2211.15841). Nothing else in tokenyard uses this package.
"""

from tokenyard_models.megablocks._install import install
from tokenyard_models.megablocks.layers.arguments import Arguments
from tokenyard_models.megablocks.layers.dmoe import ParallelDroplessMLP, dMoE
from tokenyard_models.megablocks.layers.glu import SparseGLU
from tokenyard_models.megablocks.layers.mlp import MLP, SparseMLP
from tokenyard_models.megablocks.layers.moe import MoE, ParallelMLP, get_load_balancing_loss

__all__ = [
    "MLP",
    "Arguments",
    "MoE",
    "ParallelDroplessMLP",
    "ParallelMLP",
    "SparseGLU",
    "SparseMLP",
    "dMoE",
    "get_load_balancing_loss",
    "install",
]
