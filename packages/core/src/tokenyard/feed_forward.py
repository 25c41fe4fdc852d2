"""The dense feed-forward network: a shared expert, or the FFN of a layer without experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenyard.activations import activate, up_rows
from tokenyard.adapter import LoraAdapter
from tokenyard.reset import reset


class FeedForward(nn.Module):
    """A dense FFN that computes every token: y = down(act(up(x)))."""

    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    adapter: LoraAdapter | None
    lora_weights = ("up", "down")  # those that may have an adapter

    def __init__(self, dim: int, ffn_dim: int, activation: str, bias: bool = False):
        super().__init__()
        self.activation = activation
        self.adapter = None
        rows = up_rows(activation, ffn_dim)
        self.fused_rows = {"up": (ffn_dim,) * (rows // ffn_dim)}
        self.up = nn.Parameter(torch.empty(rows, dim))
        self.down = nn.Parameter(torch.empty(dim, ffn_dim))
        self.register_parameter("up_bias", nn.Parameter(torch.empty(rows)) if bias else None)
        self.register_parameter("down_bias", nn.Parameter(torch.empty(dim)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix from U(-b, b) with b = 1/sqrt(fan in), and zero the biases."""
        reset((self.up, self.down), (self.up_bias, self.down_bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return y [T, D] for tokens x [T, D]."""
        z = self._linear(x, "up")  # [T, 2F or F]
        return self._linear(activate(z, self.activation), "down")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = F.linear(x, getattr(self, name), getattr(self, f"{name}_bias"))
        return y if self.adapter is None else self.adapter(y, x, name)
