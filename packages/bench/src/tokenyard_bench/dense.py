"""The upper limit of speed: a layer's six matmuls as dense ones over its T*K rows."""

from __future__ import annotations

import torch

from tokenyard import Workload
from tokenyard.activations import up_rows
from tokenyard.measure.timing import Stages

MATMULS = ("up", "down", "d activation", "d down", "d input", "d up")
"""In the order of a forward pass (the first two) and a backward pass."""


class DenseMatmuls:
    """The six matmuls of one matrix each, for some rows. They write into memory allocated once."""

    def __init__(self, workload: Workload, rows: int):
        dim = workload.dim
        ffn_dim = workload.ffn_dim
        up_width = up_rows(workload.activation, ffn_dim)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, device=workload.device, dtype=workload.dtype)

        self.x = random(rows, dim)  # rows of tokens
        self.z = random(rows, up_width)  # before the activation
        self.a = random(rows, ffn_dim)  # after the activation
        self.up = random(up_width, dim)
        self.down = random(dim, ffn_dim)
        self.x_out = torch.empty_like(self.x)
        self.z_out = torch.empty_like(self.z)
        self.a_out = torch.empty_like(self.a)
        self.up_out = torch.empty_like(self.up)
        self.down_out = torch.empty_like(self.down)

    def matmul(self, name: str) -> None:
        """Compute one of MATMULS."""
        {
            "up": lambda: torch.mm(self.x, self.up.T, out=self.z_out),
            "down": lambda: torch.mm(self.a, self.down.T, out=self.x_out),
            "d activation": lambda: torch.mm(self.x, self.down, out=self.a_out),
            "d down": lambda: torch.mm(self.x.T, self.a, out=self.down_out),
            "d input": lambda: torch.mm(self.z, self.up, out=self.x_out),
            "d up": lambda: torch.mm(self.z.T, self.x, out=self.up_out),
        }[name]()

    def stages(self) -> Stages:
        """Return the matmuls of the forward and of the backward pass."""
        return (lambda _: self._matmuls(MATMULS[:2]), lambda _: self._matmuls(MATMULS[2:]))

    def _matmuls(self, names: tuple[str, ...]) -> None:
        for name in names:
            self.matmul(name)
