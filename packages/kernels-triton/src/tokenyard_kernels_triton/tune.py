"""Trying tiles for one layer's products on this GPU, and keeping the fastest."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as combinations
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard_kernels_triton._device import current_device
from tokenyard_kernels_triton.gluon_tiling import (
    CHUNKS,
    PRODUCTS,
    GluonTiling,
    Product,
    bucket,
    gluon_tiling,
)
from tokenyard_kernels_triton.ops import _gluon
from tokenyard_kernels_triton.ops._row_tiles import RowTiles

_FLUSH_BYTES = 1 << 29  # more than L2 holds
_WARM, _TIMED = 2, 7

Launch = Callable[[GluonTiling], object]
Clock = Callable[[Callable[[], object]], float]


class Result(NamedTuple):
    """What trying the tiles of one product gave."""

    product: Product
    bucket: str
    shipped_ms: float
    best_ms: float
    best: GluonTiling


def candidates(product: Product) -> list[GluonTiling]:
    """List the tiles to try: those that fit into shared memory."""
    sizes = combinations((3, 4), CHUNKS, (1, 2), (4, 16, 32))
    tilings = [
        GluonTiling(stages, chunk, buffers, group=group) for stages, chunk, buffers, group in sizes
    ]
    return [tiling for tiling in tilings if tiling.fits(product)]


def tune(
    tokens: int, dim: int, ffn_dim: int, num_experts: int, top_k: int, clock: Clock | None = None
) -> list[Result]:
    """Time all candidates of all products of a gated bfloat16 layer whose experts have equally many rows.

    `clock` returns the milliseconds that a call takes; by default the median of some, by CUDA events.
    """
    device = current_device()
    launches = _launches(tokens, top_k, dim, ffn_dim, num_experts, device)
    timed = clock or CudaClock()
    return [_best(product, *launches[product], timed, device) for product in PRODUCTS]


def _best(
    product: Product, launch: Launch, dim: int, ffn_dim: int, clock: Clock, device: torch.device
) -> Result:
    shipped = clock(lambda: launch(gluon_tiling(product, dim, ffn_dim, device)))
    times = {tiling: clock(lambda tiling=tiling: launch(tiling)) for tiling in candidates(product)}  # type: ignore[misc]
    best = min(times, key=lambda tiling: times[tiling])
    return Result(product, bucket(product, dim, ffn_dim), shipped, times[best], best)


def _launches(
    tokens: int, top_k: int, dim: int, ffn_dim: int, experts: int, device: torch.device
) -> dict[Product, tuple[Launch, int, int]]:
    """Return for each product how to launch it with given tiles, and its widths."""
    rows = tokens * top_k
    offsets = torch.linspace(0, rows, experts + 1, device=device).int()
    order = torch.randperm(rows, device=device).int()
    plan = Plan(order, order.argsort().int(), offsets, top_k)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    x, z, a = (
        _gluon.rows_of(random(tokens, dim), plan, ffn_dim),
        random(rows, 2 * ffn_dim),
        random(rows, ffn_dim),
    )
    up, down = random(experts, 2 * ffn_dim, dim), random(experts, dim, ffn_dim)

    def layout() -> RowTiles:
        return RowTiles(offsets, rows)

    times, gradient = _gluon.times_weight, _gluon.weight_gradient
    return {
        "up": (
            lambda how: _gluon.up_and_activate(x, up, None, layout(), "swiglu", how=how),
            dim,
            ffn_dim,
        ),
        "down": (lambda how: times(a, down, None, layout(), True, "down", how), dim, ffn_dim),
        "activation_gradient": (
            lambda how: times(x, down, None, layout(), False, "activation_gradient", how),
            dim,
            ffn_dim,
        ),
        "input_gradient": (
            lambda how: times(z, up, None, layout(), False, "input_gradient", how),
            dim,
            2 * ffn_dim,
        ),
        "up_gradient": (lambda how: gradient(z, x, layout(), "up_gradient", how), dim, 2 * ffn_dim),
        "down_gradient": (lambda how: gradient(x, a, layout(), "down_gradient", how), dim, ffn_dim),
    }


class CudaClock:
    """The median time of some calls by CUDA events, each after L2 has been overwritten."""

    def __init__(self) -> None:
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        """Return milliseconds."""
        times = []
        for _ in range(_WARM + _TIMED):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return median(times[_WARM:])
