"""The module that owns the packed expert weights; whatever computes them, its state dict stays the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenyard.activations import up_rows
from tokenyard.errors import ConfigError
from tokenyard.experts._weights import local_weight
from tokenyard.initial import reset
from tokenyard.interfaces import Exchange, ExpertKernel, ExpertWeights, Permutation, Routing
from tokenyard.numerics import compute_dtype
from tokenyard.workload import Workload


class Experts(nn.Module):
    """Holds the experts' weights and computes them through an exchange; the nested unit of FSDP and expert parallelism.

    A strategy may replace the weights by shards (DTensor) and `exchange` by one that moves tokens.
    """

    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    adapter: (
        nn.Module | None
    )  # takes ExpertWeights and returns those that are computed with; see ``tokenyard.lora``

    def __init__(
        self, workload: Workload, permutation: Permutation, kernel: ExpertKernel, exchange: Exchange
    ):
        super().__init__()
        self.workload = workload
        self.permutation, self.kernel, self.exchange = permutation, kernel, exchange
        self.adapter = None
        experts, dim, ffn_dim = workload.num_experts, workload.dim, workload.ffn_dim
        rows = up_rows(workload.activation, ffn_dim)
        self.up = nn.Parameter(torch.empty(experts, rows, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, ffn_dim))
        self.register_parameter(
            "up_bias", nn.Parameter(torch.empty(experts, rows)) if workload.bias else None
        )
        self.register_parameter(
            "down_bias", nn.Parameter(torch.empty(experts, dim)) if workload.bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix uniformly within 1/sqrt(fan in), as nn.Linear does, and zero the biases."""
        reset((self.up, self.down), (self.up_bias, self.down_bias))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return y [T, D] for tokens x [T, D]; they travel in the dtype that they are computed in."""
        return self.exchange(x.to(compute_dtype(x)), routing, self.compute)

    def compute(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, rows: int | None = None
    ) -> Tensor:
        """Compute tokens x [S, D] on the experts of this rank; ids count from its first one."""
        self.workload.check_input(x)
        dtype = compute_dtype(x)
        up_bias, down_bias = (
            None if b is None else local_weight(b, dtype) for b in (self.up_bias, self.down_bias)
        )
        weights = ExpertWeights(
            local_weight(self.up, dtype), local_weight(self.down, dtype), up_bias, down_bias
        )
        if self.adapter is not None:
            weights = self.adapter(weights)
        x = x.to(dtype)
        if weights.up.dtype != dtype:
            raise ConfigError(
                f"x is {dtype} but the experts' weights are {weights.up.dtype}; cast one, or use autocast"
            )
        plan = self.permutation.plan(topk_ids, weights.up.shape[0], rows)
        return self.kernel(x, plan, topk_weights, weights)
