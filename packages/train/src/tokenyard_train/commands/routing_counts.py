"""Counting how a model routes tokens: each layer's load, dead experts, and experts that are chosen together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard import Model, moe_layers
from tokenyard_train.records.routing import normalised_entropy

_SAMPLE, _AT_ONCE = 1024, 8  # tokens of a sample at most, and samples of a forward pass


class LayerReport(NamedTuple):
    """One MoE layer's routing of a text."""

    load: list[float]  # each expert's share of the slots
    entropy: float  # of the load, over that of a uniform one
    busiest: float  # the largest load, as a multiple of the mean
    dead: list[int]  # experts without a token
    together: list[
        list[float]
    ]  # [i][j]: of the tokens that go to expert i, the share that goes to j, too


@torch.no_grad()
def route(model: Model, ids: Tensor) -> list[LayerReport]:
    """Return how each MoE layer of a model routes ids [N], read in samples that do not see each other."""
    layers = moe_layers(model)
    device = next(model.parameters()).device
    both = [
        torch.zeros(2 * (moe.workload.num_experts,), dtype=torch.float64, device=device)
        for moe in layers
    ]
    hooks = [moe.register_forward_hook(_count(total)) for moe, total in zip(layers, both)]
    model.eval()
    try:
        for samples in _samples(ids, min(_SAMPLE, model.max_seq_len)):
            model(samples.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return [_layer(total.cpu()) for total in both]


def _count(total: Tensor) -> Any:
    """Return a hook that adds to total [E, E] how many tokens went to both of two experts (to one, on the diagonal)."""

    def hook(module: Any, inputs: Any, output: Any) -> None:
        ids = output[1].topk_ids.long()
        chosen = torch.zeros(
            ids.shape[0], total.shape[0] + 1, dtype=torch.float32, device=ids.device
        )
        chosen = chosen.scatter_(1, ids.clamp(max=total.shape[0]), 1.0)[
            :, :-1
        ]  # the last column is of dropped slots
        total.add_((chosen.T @ chosen).double())

    return hook


def _layer(both: Tensor) -> LayerReport:
    counts = both.diagonal()
    load = (counts / counts.sum().clamp(min=1)).tolist()
    together = (both / counts.clamp(min=1).unsqueeze(1)).fill_diagonal_(0.0)
    dead = [i for i, count in enumerate(counts.tolist()) if not count]
    return LayerReport(
        load, normalised_entropy(load), max(load) * len(load), dead, together.tolist()
    )


def _samples(ids: Tensor, length: int) -> Iterator[Tensor]:
    whole = len(ids) // length * length
    yield from ids[:whole].view(-1, length).split(_AT_ONCE) if whole else ()
    if whole < len(ids):
        yield ids[whole:].unsqueeze(0)
