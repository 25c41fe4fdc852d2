"""The module that owns the packed expert weights. Its state dict is the same for all kernels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenyard.activations import up_rows
from tokenyard.adapter import LoraAdapter
from tokenyard.dtypes import compute_dtype
from tokenyard.errors import ConfigError
from tokenyard.experts._lora import lora_experts, low_rank_of
from tokenyard.experts._weights import local_weight
from tokenyard.interfaces import (
    AddingExpertKernel,
    Exchange,
    ExpertKernel,
    ExpertWeights,
    GradientSums,
    LoraExpertKernel,
    Permutation,
    Routing,
)
from tokenyard.reset import reset
from tokenyard.sharded import is_sharded
from tokenyard.workload import Workload


class Experts(nn.Module):
    """Owns the expert weights, and computes tokens through an exchange and an expert kernel.

    If the kernel does not compute their adapter (``interfaces.LoraExpertKernel``), core's grouped
    matmuls compute both instead of it.
    If `gradient_sums` is set, backward passes add the gradients of up and down to these tensors,
    and autograd gets none. Set it only where `can_add` is true.
    It is the nested unit of FSDP and expert parallelism: a strategy may replace the weights by
    shards (DTensor), and `exchange` by one that sends tokens to other ranks.
    """

    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    adapter: LoraAdapter | None
    lora_weights = ("up", "down")  # those that may have an adapter

    def __init__(
        self, workload: Workload, permutation: Permutation, kernel: ExpertKernel, exchange: Exchange
    ):
        super().__init__()
        self.workload = workload
        self.permutation = permutation
        self.kernel = kernel
        self.exchange = exchange
        self.adapter = None
        self.gradient_sums: GradientSums | None = None
        experts = workload.num_experts
        rows = up_rows(workload.activation, workload.ffn_dim)
        self.fused_rows = {"up": (workload.ffn_dim,) * (rows // workload.ffn_dim)}
        self.up = nn.Parameter(torch.empty(experts, rows, workload.dim))
        self.down = nn.Parameter(torch.empty(experts, workload.dim, workload.ffn_dim))
        up_bias = nn.Parameter(torch.empty(experts, rows)) if workload.bias else None
        down_bias = nn.Parameter(torch.empty(experts, workload.dim)) if workload.bias else None
        self.register_parameter("up_bias", up_bias)
        self.register_parameter("down_bias", down_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix from U(-b, b) with b = 1/sqrt(fan in), and zero the biases."""
        reset((self.up, self.down), (self.up_bias, self.down_bias))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return y [T, D] for tokens x [T, D]. The exchange sends them in the compute dtype."""
        return self.exchange(x.to(compute_dtype(x)), routing, self.compute)

    def compute(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, rows: int | None = None
    ) -> Tensor:
        """Return y [S, D] for tokens x [S, D], computed by the experts of this rank.

        topk_ids [S, K] count from this rank's first expert. `rows` is an upper bound of the number
        of slots that are not dropped.
        """
        self.workload.check_input(x)
        dtype = compute_dtype(x)
        weights = ExpertWeights(
            local_weight(self.up, dtype),
            local_weight(self.down, dtype),
            None if self.up_bias is None else local_weight(self.up_bias, dtype),
            None if self.down_bias is None else local_weight(self.down_bias, dtype),
        )
        x = x.to(dtype)
        if weights.up.dtype != dtype:
            raise ConfigError(
                f"x is {dtype} but the experts' weights are {weights.up.dtype}; "
                "cast one, or use autocast"
            )
        plan = self.permutation.plan(topk_ids, weights.up.shape[0], rows)
        if self.adapter is None:
            if self.gradient_sums is None:
                return self.kernel(x, plan, topk_weights, weights)
            adding = cast(AddingExpertKernel, self.kernel)
            return adding.with_sums(x, plan, topk_weights, weights, self.gradient_sums)
        low_rank = low_rank_of(self.adapter, x, plan, weights)
        if self._kernel_takes(self.adapter):
            kernel = cast(LoraExpertKernel, self.kernel)
            return kernel.with_adapter(x, plan, topk_weights, weights, low_rank)
        activation = self.workload.activation
        return lora_experts(x, plan, topk_weights, weights, low_rank, activation)

    @property
    def can_add(self) -> bool:
        """Whether the kernel adds to `gradient_sums`, and nothing needs the gradients elsewhere.

        FSDP reduces gradients of gathered weights, hooks of a weight are called by autograd, and
        frozen weights have no gradient.
        """
        return (
            self.adapter is None
            and _adds(self.kernel)
            and not any(
                is_sharded(weight)
                or not weight.requires_grad
                or weight._backward_hooks
                or weight._post_accumulate_grad_hooks
                for weight in (self.up, self.down)
            )
        )

    def prepare(self, tokens: int, sums: bool = False) -> None:
        """Compile what the expert kernel launches for `tokens` tokens, see ``MoE.prepare``."""
        kernel: Any = self.kernel
        if self.adapter is None:
            if sums and self.can_add and hasattr(kernel, "prepare_with_sums"):
                kernel.prepare_with_sums(tokens)
            elif hasattr(kernel, "prepare"):
                kernel.prepare(tokens)
        elif self._kernel_takes(self.adapter) and hasattr(kernel, "prepare_with_adapter"):
            kernel.prepare_with_adapter(tokens, self.adapter)

    def _kernel_takes(self, adapter: LoraAdapter) -> bool:
        """Return whether the kernel computes an adapter; if not, core does."""
        limit: int = getattr(self.kernel, "max_lora_rank", 0)
        return adapter.settings.rank <= limit


def _adds(kernel: ExpertKernel) -> bool:
    """Return whether a kernel adds to sums what its call would compute.

    A class that overrides the call alone does not: it inherits the sums of another call.
    """
    for owner in type(kernel).__mro__:
        if "with_sums" in vars(owner):
            return bool(getattr(kernel, "adds_to_sums", False))
        if "__call__" in vars(owner):
            return False
    return False
