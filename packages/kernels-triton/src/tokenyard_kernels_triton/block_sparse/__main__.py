"""Measure block-sparse matmuls on this GPU beside dense ones of as many FLOPs.

Run ``python -m tokenyard_kernels_triton.block_sparse``. It takes half a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tokenyard.measure.timing import clock_for, measure
from tokenyard_kernels_triton.block_sparse import (
    BlockSparse,
    Topology,
    from_dense,
    sdd,
    topology_of_experts,
    topology_of_mask,
)

_LAYERS = {"mixtral": (8, 4096, 14336, 4096), "dbrx": (16, 6144, 10752, 4096)}
"""Experts, their width, the model's and each expert's, and rows of each expert."""

_DENSE = {
    "SDD x @ up.T": "dense x @ up.T",
    "SDD dy @ down": "dense x @ up.T",
    "DSD h @ down.T": "dense h @ down.T",
    "DSD dh @ up": "dense h @ down.T",
    "DSD dh.T @ x": "dense dh.T @ x",
    "DDS x.T @ dh": "dense dh.T @ x",
    "dense x @ up.T": "dense x @ up.T",
    "dense h @ down.T": "dense h @ down.T",
    "dense dh.T @ x": "dense dh.T @ x",
}
"""Each matmul of a layer, and the dense one of as many FLOPs in the same form."""

_KINDS = ("SDD", "DSD", "DDS")
_SIZE = 8192  # rows and columns of the matrices of which a share is stored
_DENSITIES = (0.05, 0.2, 0.5, 0.8, 1.0)
_BLOCKS = (128, 64)
_REPETITIONS = 10

Calls = dict[str, Callable[[], object]]


def main() -> int:
    """Print two tables. Returns 0, or 2 without a GPU."""
    if not torch.cuda.is_available():
        print("block-sparse matmuls are measured on a GPU, and torch finds none", file=sys.stderr)
        return 2
    print("block-diagonal, the matmuls of a layer's experts; TFLOP/s, share of the dense one")
    for name, (experts, dim, ffn_dim, rows) in _LAYERS.items():
        torch.manual_seed(0)
        _measure_layer(name, experts, dim, ffn_dim, rows)
        torch.cuda.empty_cache()
    print(f"random blocks of {_SIZE} x {_SIZE} times a dense matrix; speed-up over the dense one")
    for block in _BLOCKS:
        torch.manual_seed(0)
        _measure_densities(block)
    return 0


def _random(*size: int) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def _median(calls: Calls) -> dict[str, float]:
    """Return milliseconds by name, measured in turns."""
    stages = {name: (lambda _, call=call: call(),) for name, call in calls.items()}
    spreads = measure(stages, clock_for(torch.device("cuda")), _REPETITIONS)
    return {name: spread[0].median for name, spread in spreads.items()}


def _measure_layer(name: str, experts: int, dim: int, ffn_dim: int, rows: int) -> None:
    total = experts * rows
    topology = _block_diagonal(experts, ffn_dim, rows)
    x = _random(total, dim)
    up = _random(experts, ffn_dim, dim)
    down = _random(experts, dim, ffn_dim)
    hidden = sdd(x, up.mT, topology)
    wide = _random(total, ffn_dim)
    calls: Calls = {  # the keys of _DENSE
        "SDD x @ up.T": partial(sdd, x, up.mT, topology),
        "SDD dy @ down": partial(sdd, x, down, topology),
        "DSD h @ down.T": lambda: hidden @ down.mT,
        "DSD dh @ up": lambda: hidden @ up,
        "DSD dh.T @ x": lambda: hidden.T @ x,
        "DDS x.T @ dh": lambda: x.T @ hidden,
        "dense x @ up.T": lambda: x @ up[0].T,
        "dense h @ down.T": lambda: wide @ down[0].T,
        "dense dh.T @ x": lambda: wide.T @ x,
    }
    times = _median(calls)
    for call, milliseconds in times.items():
        rate = 2 * total * dim * ffn_dim / milliseconds / 1e9
        share = times[_DENSE[call]] / milliseconds
        print(f"  {name:8} {call:17} {milliseconds:8.3f} ms {rate:6.0f} {share:6.2f}")


def _block_diagonal(experts: int, ffn_dim: int, rows: int) -> Topology:
    block = 128
    offsets = torch.arange(experts + 1, device="cuda") * (rows // block)
    widths = torch.full((experts,), ffn_dim // block, device="cuda")
    blocks = experts * rows // block
    return topology_of_experts(offsets, blocks, widths, ffn_dim // block, block)


def _measure_densities(block: int) -> None:
    left = _random(_SIZE, _SIZE)
    right = _random(_SIZE, _SIZE)
    calls: Calls = {"dense": lambda: left @ right}
    count = _SIZE // block
    for density in _DENSITIES:
        mask = torch.rand(count, count, device="cuda") < density
        topology = topology_of_mask(mask, block)
        sparse = from_dense(left, topology)
        calls |= {
            f"SDD {density}": partial(sdd, left, right, topology),
            f"DSD {density}": partial(_times, sparse, right),
            f"DDS {density}": partial(_from_left, right, sparse),
        }
    times = _median(calls)
    for density in _DENSITIES:
        cells = [f"{kind} {times['dense'] / times[f'{kind} {density}']:5.2f}x" for kind in _KINDS]
        print(f"  blocks of {block:3}, {density:5.0%} stored: {', '.join(cells)}")


def _times(sparse: BlockSparse, dense: Tensor) -> Tensor:
    return sparse @ dense


def _from_left(dense: Tensor, sparse: BlockSparse) -> Tensor:
    return dense @ sparse


if __name__ == "__main__":
    sys.exit(main())
