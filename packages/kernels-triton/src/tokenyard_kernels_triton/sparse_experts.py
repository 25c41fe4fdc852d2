"""The `sparse` experts: MegaBlocks' algorithm, one block-sparse matmul up and one down."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard.activations import GATED, activate, is_gated
from tokenyard.experts import GroupedExperts
from tokenyard.interfaces import ExpertWeights, Permutation
from tokenyard.operators import operator
from tokenyard.workload import Workload
from tokenyard_kernels_triton.block_sparse import BlockSparse, Topology, dsd, sdd
from tokenyard_kernels_triton.block_sparse import topology_of_experts as of_experts


class SparseExperts(GroupedExperts):
    """Experts as two block-sparse matmuls over a block-diagonal topology; differentiable.

    Source: Gale et al. 2022, MegaBlocks, arXiv 2211.15841. The rows of each expert are padded to
    whole blocks. Block (i, j) of the pre-activation exists if block row i and block column j belong
    to the same expert. So experts may have different widths (``workload.ffn_dims``).

    Blocks are 128 wide, or 64 if a width is not a multiple of 128. The forward pass keeps the
    padded rows, the pre-activation and the activation.
    """

    def __init__(self, workload: Workload, permutation: Permutation):
        super().__init__(workload, permutation)
        widths = workload.ffn_dims or (workload.ffn_dim,)
        self.block = 64 if any(width % 128 for width in widths) else 128
        self.most = workload.ffn_dim // self.block
        self.widths: Tensor | None = None  # [E] in blocks, if they differ
        if workload.ffn_dims is not None:
            in_blocks = [width // self.block for width in workload.ffn_dims]
            self.widths = torch.tensor(in_blocks, device=workload.device)

    def mlp(self, rows: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
        """Return down(act(up(row))) [R, D] for rows [R, D]."""
        padding = pad(offsets, rows.shape[0], self.block)
        x = move_rows(rows, padding.source, padding.position)  # [P, D]
        hidden = self._topology(padding, gated=False)
        gated = is_gated(self.workload.activation)
        z = sdd(x, weights.up.mT, self._topology(padding, gated=True) if gated else hidden)
        y = dsd(BlockSparse(self._activate(z.data), hidden), weights.down.mT)  # [P, D]
        return move_rows(y, padding.position, padding.source)

    def _topology(self, padding: Padding, gated: bool) -> Topology:
        widths = self.widths
        if widths is None:
            experts = padding.starts.shape[0] - 1
            widths = torch.full((experts,), self.most, device=padding.starts.device)
        blocks = padding.source.shape[0] // self.block
        return of_experts(padding.starts, blocks, widths, self.most, self.block, gated)

    def _activate(self, data: Tensor) -> Tensor:
        """Return the activation of blocks [blocks, B, B]; gate and up blocks alternate."""
        activation = self.workload.activation
        if not is_gated(activation):
            return activate(data, activation)
        gate, up = data.unflatten(0, (data.shape[0] // 2, 2)).unbind(1)
        if activation in GATED:
            return GATED[activation](gate) * up
        return activate(torch.cat([gate, up], -1), activation)  # SwiGLU with options


class Padding(NamedTuple):
    """Where rows [R, D] lie among rows [P, D] that are padded to whole blocks for each expert."""

    starts: Tensor  # [E + 1] first block of each expert
    source: Tensor  # [P] row of each padded row; R if it is padding
    position: Tensor  # [R] padded row of each row; P in the tail


def pad(offsets: Tensor, rows: int, block: int) -> Padding:
    """Return the padding of a plan with offsets [E + 1] and `rows` rows, without a host sync."""
    counts = offsets.diff()  # [E]
    experts = counts.shape[0]
    starts = torch.cat([offsets[:1], ((counts + block - 1) // block).cumsum(0, dtype=torch.int32)])
    bound = (rows + min(experts, rows) * (block - 1)) // block * block  # P

    padded = torch.arange(bound, device=offsets.device, dtype=torch.int32)
    expert = torch.searchsorted(starts[1:] * block, padded, right=True).clamp(max=experts - 1)
    in_expert = padded - starts[expert] * block
    source = torch.where(in_expert < counts[expert], offsets[expert] + in_expert, rows)

    row = torch.arange(rows, device=offsets.device, dtype=torch.int32)
    expert = torch.searchsorted(offsets[1:].contiguous(), row, right=True).clamp(max=experts - 1)
    position = starts[expert] * block + row - offsets[expert]
    return Padding(starts, source, torch.where(row < offsets[-1], position, bound))


@operator("tokenyard_sparse::move_rows")
def move_rows(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return [P, D]: for each i the row source[i] of x [R, D], or zeros if that is R or more.

    `target` [R] is the inverse: the row of the result that each row of x moves to, P for none.
    """
    if x.shape[0] == 0 or source.shape[0] == 0:
        return x.new_zeros(source.shape[0], x.shape[1])
    rows = x.index_select(0, source.clamp(max=x.shape[0] - 1))
    return torch.where((source < x.shape[0]).unsqueeze(1), rows, rows.new_zeros(()))


@move_rows.fake
def _(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return x.new_empty(source.shape[0], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    source, target = ctx.saved_tensors
    return move_rows(gradient, target, source), None, None


move_rows.differentiable(_backward, _save)
