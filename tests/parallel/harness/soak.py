"""Many steps of a model with experts, whose routing is skewed and different in every step."""

from __future__ import annotations

import resource
from typing import NamedTuple

import torch
import torch.distributed as dist

from harness.equality import DIM, EXPERTS, Case, Layout, build

TOKENS = 256


class Soak(NamedTuple):
    """What many steps left."""

    steps: int
    norm: float  # of the last step, the same on every rank
    early: int  # bytes held after a tenth of the steps, as the allocator or the system counts them
    late: int  # and at the end
    busiest: float  # the largest load of an expert in the last step, as a multiple of the mean


def soak(layout: Layout, steps: int, device: str) -> Soak:
    """Train; every step's ids are drawn with popularity 1/r, and which expert is popular changes."""
    strategy, model = build(layout, Case(dtype=torch.float32, device=device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    early, norm, load = 0, 0.0, 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        popularity = (1 / torch.arange(1, EXPERTS + 1)).roll(step)
        ids = [
            torch.multinomial(popularity.expand(TOKENS, -1), 2, generator=generator)
            for _ in range(2)
        ]
        load = float(torch.bincount(ids[0].flatten(), minlength=EXPERTS).max()) / (
            2 * TOKENS / EXPERTS
        )
        x = torch.randn(TOKENS, DIM, generator=generator).to(device)
        y, _ = model(x, [i.int().to(device) for i in ids])
        ((y - 1).square().sum() / (TOKENS * strategy.data[1])).backward()
        norm = float(strategy.clip(model, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if step == steps // 10:
            early = held(device)
    return Soak(steps, norm, early, held(device), load)


def held(device: str) -> int:
    """Return the bytes that this process holds at most so far."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
