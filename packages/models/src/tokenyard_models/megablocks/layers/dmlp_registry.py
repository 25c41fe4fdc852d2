"""The experts of dMoE, by `mlp_type` and `mlp_impl`."""

from __future__ import annotations

from tokenyard_models.megablocks.layers import glu, mlp
from tokenyard_models.megablocks.layers.arguments import Arguments

_EXPERTS: dict[tuple[str, str], type[mlp.SparseMLP]] = {
    ("mlp", "grouped"): mlp.GroupedMLP,
    ("mlp", "sparse"): mlp.SparseMLP,
    ("glu", "grouped"): glu.GroupedGLU,
    ("glu", "sparse"): glu.SparseGLU,
}


def get(args: Arguments) -> mlp.SparseMLP:
    """Return new experts."""
    return _EXPERTS[args.mlp_type, args.mlp_impl](args)
