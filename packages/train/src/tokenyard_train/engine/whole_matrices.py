"""Compute whole matrices of sharded parameters, each on one rank.

FSDP cuts weights into rows or columns. For each parameter, its matrices are divided among the ranks
that hold its shards. One all-to-all brings every matrix to its rank, and another one brings back
the result, so each matrix is computed once and travels twice. Stacks that are cut between matrices,
such as experts, stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard.sharded import is_sharded

Compute = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""``(parameters, stacks) -> results``: stacks of whole matrices [B, R, C], and results like them.

The stack of a parameter has some of its matrices, possibly none. Results may overwrite it.
"""


class _Cut(NamedTuple):
    """The process group over which matrices are cut, and the dimension from the end: -2 or -1."""

    group: Any
    rank: int
    ranks: int
    dim: int

    def sizes(self, parameter: Tensor) -> list[int]:
        """Return the size of each rank's part along `dim`, as ``torch.chunk`` cuts it."""
        size = parameter.shape[self.dim]
        most = -(-size // self.ranks)
        return [max(0, min(most, size - rank * most)) for rank in range(self.ranks)]


def on_whole_matrices(
    parameters: Sequence[Tensor], parts: Sequence[Tensor], compute: Compute
) -> list[Tensor]:
    """Return this rank's parts of what `compute` returns for whole matrices.

    `parts` are this rank's parts of tensors with the shape and layout of the `parameters`: matrices
    [R, C] or stacks of them [B, R, C], of one dtype. All ranks call it with the same parameters.
    """
    stacks = [part.unsqueeze(0) if part.dim() == 2 else part for part in parts]
    results = list(stacks)
    by_cut: dict[_Cut | None, list[int]] = {}
    for index, parameter in enumerate(parameters):
        by_cut.setdefault(_cut_of(parameter), []).append(index)
    for cut, indices in by_cut.items():
        chosen = [parameters[i] for i in indices]
        local = [stacks[i] for i in indices]
        done = compute(chosen, local) if cut is None else _exchanged(cut, chosen, local, compute)
        for index, result in zip(indices, done):
            results[index] = result
    return [result.view(part.shape) for result, part in zip(results, parts)]


def _cut_of(parameter: Tensor) -> _Cut | None:
    """Return how a parameter's matrices are cut, None if each is whole on its rank."""
    if not is_sharded(parameter):
        return None
    mesh = parameter.device_mesh
    cuts = [
        _Cut(mesh.get_group(i), mesh.get_local_rank(i), mesh.size(i), dim - parameter.dim())
        for i, placement in enumerate(parameter.placements)
        if (dim := getattr(placement, "dim", 0)) >= parameter.dim() - 2
        and placement.is_shard()
        and mesh.size(i) > 1
    ]
    if len(cuts) > 1:
        raise NotImplementedError(f"matrices are cut along {len(cuts)} dimensions of a mesh")
    return cuts[0] if cuts else None


def _exchanged(
    cut: _Cut, parameters: Sequence[Tensor], stacks: Sequence[Tensor], compute: Compute
) -> list[Tensor]:
    """Exchange parts of matrices for whole ones, compute these, and exchange the results back.

    Matrices are numbered over all parameters. Rank r of the group has numbers r, r + ranks, ...
    """
    ends = torch.tensor([len(stack) for stack in stacks]).cumsum(0).tolist()
    starts = [end - len(stack) for end, stack in zip(ends, stacks)]

    def of_rank(rank: int, start: int) -> slice:
        return slice((rank - start) % cut.ranks, None, cut.ranks)

    # To the rank of each matrix
    sent = [
        [stack[of_rank(rank, start)] for stack, start in zip(stacks, starts)]
        for rank in range(cut.ranks)
    ]
    sizes = [cut.sizes(parameter) for parameter in parameters]
    received = _all_to_all(
        sent,
        [
            [_resized(part.shape, cut.dim, size[rank]) for part, size in zip(sent[cut.rank], sizes)]
            for rank in range(cut.ranks)
        ],
        cut.group,
    )
    whole = [torch.cat(parts, cut.dim) for parts in zip(*received)]
    # And back
    results = [
        result.split(size, cut.dim) for result, size in zip(compute(parameters, whole), sizes)
    ]
    shapes = [[part.shape for part in parts] for parts in sent]
    returned = _all_to_all([list(parts) for parts in zip(*results)], shapes, cut.group)
    outputs = [torch.empty_like(stack) for stack in stacks]
    for rank, parts in enumerate(returned):
        for output, start, part in zip(outputs, starts, parts):
            output[of_rank(rank, start)] = part
    return outputs


def _resized(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    resized = list(shape)
    resized[dim] = size
    return tuple(resized)


def _all_to_all(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], group: Any
) -> list[list[Tensor]]:
    """Send tensors to each rank of a group; return those of `shapes` from each rank."""
    flat = torch.cat([part.reshape(-1) for parts in sent for part in parts])
    counts = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
    out = flat.new_empty(_total(counts))
    dist.all_to_all_single(
        out,
        flat,
        [sum(of_rank) for of_rank in counts],
        [sum(part.numel() for part in parts) for parts in sent],
        group=group,
    )
    pieces = iter(out.split([count for of_rank in counts for count in of_rank]))
    return [[next(pieces).view(*shape) for shape in of_rank] for of_rank in shapes]


def _total(counts: Iterable[Iterable[int]]) -> int:
    return sum(sum(of_rank) for of_rank in counts)
