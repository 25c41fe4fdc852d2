"""Llama with feed-forward weights of which only some blocks exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard import ConfigError, SavedBytes, activate
from tokenyard.draw import draw_normal, unwrapped
from tokenyard.dtypes import compute_dtype
from tokenyard_kernels_triton.block_sparse import BlockSparse, Topology, dds, topology_of_mask
from tokenyard_models import Llama


class PrunedLinear(nn.Module):
    """y = x @ W.T for a block-sparse matrix W [N, M], of which a share `density` of blocks exists.

    Each row of blocks has the same number of them, at random columns.
    """

    def __init__(self, inputs: int, outputs: int, block: int, density: float, seed: int):
        super().__init__()
        rows = outputs // block
        columns = inputs // block
        self.block = block
        self.kept = max(1, round(density * columns))  # blocks of a row
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(rows, columns, generator=generator, device="cpu").argsort(1)
        self.mask = order < self.kept  # [rows, columns], never on the meta device
        self.data = nn.Parameter(torch.empty(rows * self.kept, block, block))
        self.topology: Topology | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return y [T, N] for x [T, M]."""
        if self.topology is None or self.topology.row_indices.device != x.device:
            self.topology = topology_of_mask(self.mask.to(x.device), self.block)
        dtype = compute_dtype(x)
        weight = BlockSparse(self.data.to(dtype), self.topology)
        return dds(x.to(dtype), weight.T)


class PrunedFeedForward(nn.Module):
    """down(act(up(x))), with block-sparse matrices."""

    def __init__(self, up: PrunedLinear, down: PrunedLinear, activation: str):
        super().__init__()
        self.up = up
        self.down = down
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return y [B, S, D] for x [B, S, D]."""
        z = self.up(x.flatten(0, -2))  # [T, 2F]
        return self.down(activate(z, self.activation)).view(x.shape)


class PrunedLlama(Llama):
    """Llama's keys, and two more: `density` of the feed-forward weights, and their `block`."""

    definition = "pruned_llama"

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        self.keys = {k: v for k, v in config.items() if k not in ("density", "block")}
        super().__init__(self.keys, **placement)
        density = config.get("density", 0.25)
        block = config.get("block", 64)
        dim = self.config.dim
        width = self.config.dense_width
        if not isinstance(density, int | float) or not 0 < density <= 1:
            raise ConfigError(f"model.density is {density!r}; give a number above 0, at most 1")
        if block not in (64, 128) or dim % block or width % block:
            raise ConfigError(
                f"model.block is {block!r}; give 64 or 128, whichever divides hidden_size {dim} "
                f"and intermediate_size {width}"
            )
        for layer, module in enumerate(self.blocks):
            like = module.ffn.up
            with torch.device(like.device):
                up = PrunedLinear(dim, 2 * width, block, density, seed=2 * layer)
                down = PrunedLinear(width, dim, block, density, seed=2 * layer + 1)
            module.ffn = PrunedFeedForward(up, down, self.config.dense_activation).to(like.dtype)

    def init_weights(self, seed: int) -> None:
        """Draw the pruned weights from N(0, 1 / fan-in); those into the residual are smaller."""
        super().init_weights(seed)
        modules = {unwrapped(name): module for name, module in self.named_modules()}
        for name, linear in modules.items():
            if isinstance(linear, PrunedLinear):
                fan_in = linear.kept * linear.block
                residual = 2 * self.config.layers if name.endswith("down") else 1
                std = (fan_in * residual) ** -0.5
                draw_normal(linear.data, seed, f"{name}.data", std)

    def saved_bytes_per_token(self, seq_len: int, width: int) -> SavedBytes:
        """Return what Llama saves: pruning changes weights, not activations."""
        with torch.device("meta"):
            return Llama(self.keys).saved_bytes_per_token(seq_len, width)
