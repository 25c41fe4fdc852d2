"""Count how a model routes tokens: load, dead experts, and pairs of experts, per MoE layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard import Model, moe_layers
from tokenyard_train.records.routing import normalised_entropy

_SAMPLE_TOKENS = 1024  # maximum length of a sample
_BATCH = 8  # samples per forward pass


class LayerReport(NamedTuple):
    """One MoE layer's routing of a text."""

    load: list[float]  # each expert's share of the slots
    entropy: float  # normalised entropy of the load: 1 is uniform
    busiest: float  # the largest load, as a multiple of the mean
    dead: list[int]  # experts without a token
    together: list[list[float]]  # [i][j]: share of expert i's tokens that also go to expert j


@torch.no_grad()
def route(model: Model, ids: Tensor) -> list[LayerReport]:
    """Return how each MoE layer of a model routes ids [N], cut into independent samples."""
    layers = moe_layers(model)
    device = next(model.parameters()).device
    pair_counts = [
        torch.zeros(2 * (moe.workload.num_experts,), dtype=torch.float64, device=device)
        for moe in layers
    ]
    hooks = [
        moe.register_forward_hook(_counting_hook(counts))
        for moe, counts in zip(layers, pair_counts)
    ]
    model.eval()
    try:
        for samples in _samples(ids, min(_SAMPLE_TOKENS, model.max_seq_len)):
            model(samples.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return [_layer_report(counts.cpu()) for counts in pair_counts]


def _counting_hook(pair_counts: Tensor) -> Any:
    """Return a forward hook that counts tokens per pair of experts.

    It adds to pair_counts [E, E] the tokens routed to both experts. The diagonal counts the tokens
    of one expert.
    """
    experts = pair_counts.shape[0]

    def hook(module: Any, inputs: Any, output: Any) -> None:
        ids = output[1].topk_ids.long()  # [T, K]
        # The last column collects dropped slots.
        chosen = torch.zeros(ids.shape[0], experts + 1, dtype=torch.float32, device=ids.device)
        chosen = chosen.scatter_(1, ids.clamp(max=experts), 1.0)[:, :-1]  # [T, E]
        pair_counts.add_((chosen.T @ chosen).double())

    return hook


def _layer_report(pair_counts: Tensor) -> LayerReport:
    counts = pair_counts.diagonal()
    shares = counts / counts.sum().clamp(min=1)
    load = shares.tolist()
    together = (pair_counts / counts.clamp(min=1).unsqueeze(1)).fill_diagonal_(0.0)
    dead = [i for i, count in enumerate(counts.tolist()) if not count]
    return LayerReport(
        load, normalised_entropy(shares).item(), max(load) * len(load), dead, together.tolist()
    )


def _samples(ids: Tensor, length: int) -> Iterator[Tensor]:
    """Yield batches [B, length], then the rest as one shorter sample."""
    whole = len(ids) // length * length
    yield from ids[:whole].view(-1, length).split(_BATCH) if whole else ()
    if whole < len(ids):
        yield ids[whole:].unsqueeze(0)
