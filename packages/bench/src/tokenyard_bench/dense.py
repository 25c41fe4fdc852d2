"""The ceiling: a layer's six products as dense matrix products over its T*K rows."""

from __future__ import annotations

import torch

from tokenyard import Workload
from tokenyard.activations import up_rows
from tokenyard.measure.timing import Stages
from tokenyard_bench.shapes import Shape

PRODUCTS = ("up", "down", "d activation", "d down", "d input", "d up")
"""In the order of a forward and a backward pass."""


class DenseProducts:
    """The six products of a shape, written into memory that is allocated once."""

    def __init__(self, shape: Shape, workload: Workload):
        rows, dim, ffn_dim = shape.slots, shape.dim, shape.ffn_dim
        wide = up_rows(workload.activation, ffn_dim)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, device=workload.device, dtype=workload.dtype)

        self.x, self.z, self.a = random(rows, dim), random(rows, wide), random(rows, ffn_dim)
        self.up, self.down = random(wide, dim), random(dim, ffn_dim)
        self.to_rows, self.to_a = torch.empty_like(self.x), torch.empty_like(self.a)
        self.dup, self.ddown = torch.empty_like(self.up), torch.empty_like(self.down)
        self.to_z = torch.empty_like(self.z)

    def product(self, name: str) -> None:
        """Compute one of PRODUCTS."""
        {
            "up": lambda: torch.mm(self.x, self.up.T, out=self.to_z),
            "down": lambda: torch.mm(self.a, self.down.T, out=self.to_rows),
            "d activation": lambda: torch.mm(self.x, self.down, out=self.to_a),
            "d down": lambda: torch.mm(self.x.T, self.a, out=self.ddown),
            "d input": lambda: torch.mm(self.z, self.up, out=self.to_rows),
            "d up": lambda: torch.mm(self.z.T, self.x, out=self.dup),
        }[name]()

    def stages(self) -> Stages:
        """Return the forward pass's products, and the backward pass's, for the clock."""
        return (lambda _: self._products(PRODUCTS[:2]), lambda _: self._products(PRODUCTS[2:]))

    def _products(self, names: tuple[str, ...]) -> None:
        for name in names:
            self.product(name)
