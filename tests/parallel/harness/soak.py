"""Many steps of an MoE model whose routing is skewed, and differs in every step."""

from __future__ import annotations

import resource
from typing import NamedTuple

import torch
import torch.distributed as dist

from harness.equality import Case, Layout, build
from tokenyard.testing._over_ranks import DIM

TOKENS = 256
EXPERTS = 64


class Soak(NamedTuple):
    """The state of a rank after many steps."""

    steps: int
    norm: float  # of the last step, equal on every rank
    early_bytes: int  # peak memory after a tenth of the steps
    late_bytes: int  # peak memory after all steps
    max_load: float  # largest load of an expert in the last step / mean load


def soak(layout: Layout, steps: int, device: str) -> Soak:
    """Train with expert popularity 1/r; the most popular expert changes every step."""
    strategy, model = build(layout, Case(dtype=torch.float32, device=device, experts=EXPERTS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    early_bytes = 0
    norm = 0.0
    max_load = 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        popularity = (1 / torch.arange(1, EXPERTS + 1)).roll(step).expand(TOKENS, -1)
        ids = [torch.multinomial(popularity, 2, generator=generator) for _ in range(2)]
        mean_load = 2 * TOKENS / EXPERTS
        max_load = float(ids[0].flatten().bincount(minlength=EXPERTS).max()) / mean_load
        x = torch.randn(TOKENS, DIM, generator=generator).to(device)
        y, _ = model(x, [i.int().to(device) for i in ids])
        ((y - 1).square().sum() / (TOKENS * strategy.data[1])).backward()
        norm = float(strategy.gradient_norm(model))
        optimizer.step()
        optimizer.zero_grad()
        if step == steps // 10:
            early_bytes = peak_bytes(device)
    return Soak(steps, norm, early_bytes, peak_bytes(device), max_load)


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process: of CUDA's allocator, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
