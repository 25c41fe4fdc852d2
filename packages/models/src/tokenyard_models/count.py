"""How large a model is, and how much it computes; exact, and without allocating it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from tokenyard import moe_layers
from tokenyard_models.attention import Attention


class Size(NamedTuple):
    """Parameters of a model."""

    total: int
    active: int  # that compute one token: K of every E experts, and all else
    experts: int  # those of all experts


def count_parameters(model: nn.Module) -> Size:
    """Count the parameters of a model, tied ones once; it may stand on the meta device."""
    total = sum(p.numel() for p in model.parameters())
    experts, idle = 0, 0
    for moe in moe_layers(model):
        numel = sum(p.numel() for p in moe.experts.parameters())
        experts += numel
        idle += numel * (moe.workload.num_experts - moe.workload.top_k) // moe.workload.num_experts
    return Size(total, total - idle, experts)


def flops_per_token(model: nn.Module, seq_len: int, training: bool = False) -> float:
    """Count floating-point operations for one token of a sequence of `seq_len`, on average; x3 when training.

    2 for each active matrix weight (looking up an embedding is free, a head tied to it is not), and in each attention
    layer 4 * heads * head_dim for each position attended to, of which a causal token has (seq_len + 1) / 2 on average.
    """
    scores = sum(
        4 * m.heads * m.head_dim * (seq_len + 1) / 2
        for m in model.modules()
        if isinstance(m, Attention)
    )
    return (2 * _active_matrix_weights(model) + scores) * (3 if training else 1)


def _active_matrix_weights(model: nn.Module) -> float:
    share = {
        p: m.workload.top_k / m.workload.num_experts
        for m in moe_layers(model)
        for p in m.experts.parameters()
    }
    looked_up = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    embed = getattr(model, "embed", None)
    if getattr(model, "head", model) is None and isinstance(
        embed, nn.Embedding
    ):  # it is the head, too
        looked_up.remove(embed.weight)
    matrices = (
        p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("_bias")
    )
    return sum(p.numel() * share.get(p, 1) for p in matrices if p not in looked_up)
