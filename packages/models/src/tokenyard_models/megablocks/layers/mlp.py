"""The parameters of the experts in MegaBlocks' layouts, and the shared expert."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard import ConfigError
from tokenyard.interfaces import ExpertWeights, Routing
from tokenyard.sharded import local_part
from tokenyard_models.megablocks.layers import common, mpu
from tokenyard_models.megablocks.layers.arguments import Arguments, InitFn


def create_moe_expert_weights(
    args: Arguments, num_experts: int, ffn_hidden_size: int, hidden_size: int, init_method: InitFn
) -> Tensor:
    """Return the new weights [E, F, D] of this rank's experts.

    All are drawn, so that they do not depend on the number of ranks.
    """
    weights = torch.empty(
        num_experts, ffn_hidden_size, hidden_size, device=args.device, dtype=common.dtype(args)
    )
    init_method(weights)
    rank, ranks = common.expert_ranks(args)
    return weights.chunk(ranks)[rank].clone() if ranks > 1 else weights


class _ScaledGradient(torch.autograd.Function):
    """Returns a weight, and multiplies its gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def resolve_dtensor(weight: Tensor) -> Tensor:
    """Return this rank's part of a sharded weight."""
    return local_part(weight)


class ExpertsMLP(nn.Module):
    """Experts that tokenyard's backends compute. Subclasses own the parameters."""

    def __init__(self, args: Arguments):
        super().__init__()
        self.args = args
        self.ranks = common.expert_ranks(args)[1]
        self._parts = common.PartsCache(args)

    def parameter(self, weight: Tensor) -> nn.Parameter:
        """Return a parameter that is marked as one of experts."""
        parameter = nn.Parameter(weight)
        mpu.set_expert_model_parallel_attributes(parameter, self.args.moe_expert_model_parallelism)
        return parameter

    def local(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight to compute with.

        A rank computes its experts for the tokens of all ranks, so the gradient is a sum over
        ranks. MegaBlocks divides it by their number, as data parallelism averages others.
        """
        weight = resolve_dtensor(weight).to(dtype)
        if self.ranks == 1:
            return weight
        scaled: Tensor = _ScaledGradient.apply(weight, 1 / self.ranks)  # type: ignore[no-untyped-call]
        return scaled

    def expert_weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in tokenyard's layout: up [E, F or 2F, D] and down [E, D, F]."""
        raise NotImplementedError

    def compute(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None) -> Tensor:
        """Return the weighted sum [T, D] of the experts topk_ids [T, K] for tokens x [T, D]."""
        if self.ranks == 1 or topk_weights is None:
            return self.compute_here(x, topk_ids.int(), topk_weights)
        logits = topk_weights.new_zeros(len(x), self.args.moe_num_experts)
        routing = Routing(topk_ids.int(), topk_weights, logits)
        return self._parts.of(x).exchange(x, routing, self.compute_here)

    def compute_here(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, rows: int | None = None
    ) -> Tensor:
        """Return `compute` for the experts of this rank, from whose first one ids count."""
        parts = self._parts.of(x)
        weights = self.expert_weights(x.dtype)
        plan = parts.permutation.plan(topk_ids, len(weights.up), rows)
        if parts.kernel is not None:
            return parts.kernel(x, plan, topk_weights, weights)
        # a function without a kernel: expert by expert
        sorted_rows = parts.permutation.permute(x, plan)
        ends = plan.offsets.tolist()
        parts_of_rows = [
            self._expert(sorted_rows[start:end], weights.up[expert], weights.down[expert])
            for expert, (start, end) in enumerate(pairwise(ends))
        ]
        tail = x.new_zeros(len(sorted_rows) - ends[-1], x.shape[1])
        return parts.permutation.unpermute(torch.cat([*parts_of_rows, tail]), plan, topk_weights)

    def _expert(self, rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
        z = rows @ up.T
        if self.args.mlp_type == "glu":
            gate, z = z.chunk(2, dim=-1)
            return (self.args.activation_fn(gate) * z) @ down.T
        return self.args.activation_fn(z) @ down.T


class MLP(ExpertsMLP):
    """Experts of MoE: w1 [E, D, F] and w2 [E, F, D], of this rank's experts, not gated."""

    def __init__(self, args: Arguments):
        if args.mlp_type != "mlp":
            raise ConfigError(
                f"mlp_type is {args.mlp_type!r}, and MoE has no gated experts; use dMoE, or mlp"
            )
        super().__init__(args)
        sizes = (args.moe_num_experts, args.ffn_hidden_size, args.hidden_size)
        w1 = create_moe_expert_weights(args, *sizes, args.init_method)
        w2 = create_moe_expert_weights(args, *sizes, args.output_layer_init_method)
        self.w1 = self.parameter(w1.transpose(1, 2).contiguous())
        self.w2 = self.parameter(w2)

    def expert_weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in tokenyard's layout."""
        parts = (self.local(weight, dtype) for weight in (self.w1, self.w2))
        return ExpertWeights(*(part.transpose(1, 2).contiguous() for part in parts))

    def forward(self, x: Tensor) -> Tensor:
        """Return the experts' results [E, C, D] for binned tokens x [E, C, D]."""
        experts, capacity, dim = x.shape
        ids = torch.arange(experts, device=x.device).repeat_interleave(capacity).unsqueeze(1)
        return self.compute(x.reshape(-1, dim), ids, None).view(x.shape)


class SparseMLP(ExpertsMLP):
    """Experts of dMoE: w1 and w2 [E F, D], of this rank's experts."""

    def __init__(self, args: Arguments):
        super().__init__(args)
        self.w1 = self._weight(args.init_method)
        self.w2 = self._weight(args.output_layer_init_method)

    def _weight(self, init_method: InitFn) -> nn.Parameter:
        args = self.args
        sizes = (args.moe_num_experts, args.ffn_hidden_size, args.hidden_size)
        weights = create_moe_expert_weights(args, *sizes, init_method)
        return self.parameter(weights.view(-1, args.hidden_size))

    def stacked(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight [E F, D] as [E, F, D]."""
        args = self.args
        shape = (args.moe_num_experts // self.ranks, -1, args.hidden_size)
        return self.local(weight, dtype).view(shape)

    def expert_weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in tokenyard's layout."""
        down = self.stacked(self.w2, dtype).transpose(1, 2).contiguous()
        return ExpertWeights(self.stacked(self.w1, dtype), down)

    def forward(self, x: Tensor, tokens_per_expert: Any) -> Tensor:
        """Return the experts' results [N, D] for rows x [N, D] that are sorted by expert.

        Raises ConfigError for a block-sparse topology in place of the counts [E].
        """
        if not isinstance(tokens_per_expert, Tensor):
            raise ConfigError(
                f"the experts were given a {type(tokens_per_expert).__name__}, and block-sparse "
                "topologies are not read here; give the number of rows of each expert"
            )
        counts = tokens_per_expert.to(x.device).long()
        experts = torch.arange(len(counts), device=x.device)
        ids = experts.repeat_interleave(counts, output_size=len(x)).unsqueeze(1)
        return self.compute(x, ids, None)


class GroupedMLP(SparseMLP):
    """The same as SparseMLP, by its other name."""


class SharedMLP(nn.Module):
    """The shared expert: up_proj, the activation, and down_proj."""

    def __init__(self, args: Arguments):
        super().__init__()
        self.args = args
        self.fc_kwargs: dict[str, Any] = {"bias": args.bias, "device": args.device}
        self.fc_kwargs.update(args.fc_kwargs)
        width = args.shared_expert_hidden_size
        self.up_proj = args.fc_cls(args.hidden_size, width, **self.fc_kwargs)
        self.act = args.activation_fn
        self.down_proj = args.fc_cls(width, args.hidden_size, **self.fc_kwargs)

    def add_experts_sharedexpert(self, shared_expert_out: Tensor, expert_out: Tensor) -> Tensor:
        """Return the sum of both, weighted with `shared_expert_weighted_sum`."""
        if not self.args.shared_expert_weighted_sum:
            return shared_expert_out + expert_out
        total = self.args.moe_top_k + 1
        return shared_expert_out / total + expert_out * (self.args.moe_top_k / total)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, shaped like x [..., D]."""
        y: Tensor = self.down_proj(self.act(self.up_proj(x)))
        return y
