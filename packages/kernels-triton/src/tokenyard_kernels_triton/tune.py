"""Try tiles for the matmuls of one layer on this GPU, and find the fastest."""

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
    MATMULS,
    GluonTiling,
    Matmul,
    bucket,
    gluon_tiling,
)
from tokenyard_kernels_triton.ops import _gluon
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.ops._token_rows import Rows

_FLUSH_BYTES = 1 << 29  # more than L2 holds
_WARM = 2  # calls before those that are timed
_TIMED = 7
_GATE_AND_UP: tuple[Matmul, ...] = ("input_gradient", "up_gradient")  # an operand has both

Launch = Callable[[GluonTiling], object]
Clock = Callable[[Callable[[], object]], float]


class Result(NamedTuple):
    """The times of one matmul with the shipped tile and with the fastest one."""

    matmul: Matmul
    bucket: str
    shipped_ms: float
    best_ms: float
    best: GluonTiling


class Operands(NamedTuple):
    """Random operands of a gated layer."""

    x: Rows  # [R, D]
    z: Tensor  # [R, 2F]
    a: Tensor  # [R, F]
    up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]
    offsets: Tensor  # [E + 1]


def candidates(matmul: Matmul) -> list[GluonTiling]:
    """Return the tiles to try: those that fit into shared memory."""
    sizes = combinations((3, 4), CHUNKS, (1, 2), (4, 16, 32))
    tilings = [
        GluonTiling(stages, chunk, buffers, group=group) for stages, chunk, buffers, group in sizes
    ]
    return [tiling for tiling in tilings if tiling.fits(matmul)]


def tune(
    tokens: int, dim: int, ffn_dim: int, num_experts: int, top_k: int, clock: Clock | None = None
) -> list[Result]:
    """Time all candidates for all matmuls of a gated bfloat16 layer with balanced experts.

    `clock` returns the milliseconds of a call. The default is a `CudaClock`.
    """
    device = current_device()
    offsets = torch.linspace(0, tokens * top_k, num_experts + 1, device=device).int()
    launches = _launches(_random_operands(tokens, dim, ffn_dim, top_k, offsets))
    clock = clock or CudaClock()
    results = []
    for matmul in MATMULS:
        width = 2 * ffn_dim if matmul in _GATE_AND_UP else ffn_dim
        results.append(_best(matmul, launches[matmul], dim, width, clock, device))
    return results


def _best(
    matmul: Matmul, launch: Launch, dim: int, ffn_dim: int, clock: Clock, device: torch.device
) -> Result:
    shipped = clock(lambda: launch(gluon_tiling(matmul, dim, ffn_dim, device)))
    times = {
        tiling: clock(lambda tiling=tiling: launch(tiling))  # type: ignore[misc]
        for tiling in candidates(matmul)
    }
    best = min(times, key=lambda tiling: times[tiling])
    return Result(matmul, bucket(matmul, dim, ffn_dim), shipped, times[best], best)


def _random_operands(tokens: int, dim: int, ffn_dim: int, top_k: int, offsets: Tensor) -> Operands:
    experts = offsets.shape[0] - 1
    rows = tokens * top_k
    order = torch.randperm(rows, device=offsets.device).int()
    plan = Plan(order, order.argsort().int(), offsets, top_k)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=offsets.device, dtype=torch.bfloat16)

    return Operands(
        x=_gluon.rows_of(random(tokens, dim), plan, ffn_dim),
        z=random(rows, 2 * ffn_dim),
        a=random(rows, ffn_dim),
        up=random(experts, 2 * ffn_dim, dim),
        down=random(experts, dim, ffn_dim),
        offsets=offsets,
    )


def _launches(operands: Operands) -> dict[Matmul, Launch]:
    """Return for each matmul a function that launches it with a tile.

    Every launch builds its tile list, as the first matmul of a layer does.
    """
    x, z, a, up, down, offsets = operands
    matmul = _gluon.times_weight
    gradient = _gluon.weight_gradient

    def row_tiles() -> RowTiles:
        return RowTiles(offsets, z.shape[0])

    return {
        "up": lambda t: _gluon.up_and_activate(x, up, None, row_tiles(), "swiglu", tiling=t),
        "down": lambda t: matmul(a, down, None, row_tiles(), True, "down", t),
        "activation_gradient": lambda t: matmul(
            x, down, None, row_tiles(), False, "activation_gradient", t
        ),
        "input_gradient": lambda t: matmul(z, up, None, row_tiles(), False, "input_gradient", t),
        "up_gradient": lambda t: gradient(z, x, row_tiles(), "up_gradient", t),
        "down_gradient": lambda t: gradient(x, a, row_tiles(), "down_gradient", t),
    }


class CudaClock:
    """The median time of several calls by CUDA events, each after L2 was overwritten."""

    def __init__(self) -> None:
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of a call."""
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
