"""MegaBlocks' MoE layer with a capacity, and the load-balancing loss of all layers."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from tokenyard import Balance, ConfigError, load_balancing_loss
from tokenyard_models.megablocks.layers import common, glu, mlp, router
from tokenyard_models.megablocks.layers.arguments import Arguments

Saved = tuple[Tensor, Tensor]
"""Tokens of each expert [E], and scores [T, E]."""

_LOAD_BALANCING_LOSS: list[Saved] = []  # of this forward pass: MegaBlocks' API collects them here


def save_load_balancing_loss(loss: Saved) -> None:
    """Add a layer's counts and scores to those of the forward pass; not in a recompute."""
    common.save(_LOAD_BALANCING_LOSS, loss)


def get_load_balancing_loss() -> list[Saved]:
    """Return the counts and scores of each layer in the forward pass."""
    return _LOAD_BALANCING_LOSS


def clear_load_balancing_loss() -> None:
    """Forget the counts and scores of the last forward pass."""
    _LOAD_BALANCING_LOSS.clear()


def batched_load_balancing_loss(args: Arguments) -> Tensor | float:
    """Return the weighted load-balancing loss of the layers in this pipeline stage.

    Raises ConfigError unless each of them saved its counts and scores once. MegaBlocks' own also
    has those that a recompute saves; here a recompute saves nothing.
    """
    if args.moe_loss_weight == 0:
        return 0.0
    layers = args.num_layers // args.pipeline_model_parallel_size
    if args.num_layers_per_virtual_pipeline_stage is not None:
        layers = args.num_layers_per_virtual_pipeline_stage
    saved = get_load_balancing_loss()
    if len(saved) != layers:
        raise ConfigError(
            f"{len(saved)} layers have saved a load-balancing loss, and num_layers "
            f"{args.num_layers} makes it {layers} in a stage; call clear_load_balancing_loss after "
            "each step, or set num_layers"
        )
    tokens = saved[0][1].shape[0]
    if any(scores.shape[0] != tokens for _, scores in saved):
        raise ConfigError(
            "layers have saved scores of different numbers of tokens, so they are of more than one "
            "forward pass; call clear_load_balancing_loss before each"
        )
    common.warn_without_gradient("the load-balancing loss", [scores for _, scores in saved])
    balances = [
        Balance(counts, counts.new_zeros(()), _sum(scores), scores.new_zeros(()))
        for counts, scores in saved
    ]
    mean = load_balancing_loss(balances, max(1, tokens), args.moe_top_k)
    return args.moe_loss_weight * mean * (layers / args.num_layers)


def _sum(scores: Tensor) -> Tensor:
    """Return the sum [E] of scores [T, E], at least in float32."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).sum(0)


class ParallelMLP(nn.Module):
    """The experts, of which each computes its first slots up to a capacity, and the output bias."""

    bias: nn.Parameter | None

    def __init__(self, args: Arguments):
        super().__init__()
        self.args = args
        self.num_experts = args.moe_num_experts
        self.top_k = args.moe_top_k
        self.mlp = self._experts(args)
        bias = torch.zeros(args.hidden_size, device=args.device, dtype=common.dtype(args))
        self.register_parameter("bias", nn.Parameter(bias) if args.bias else None)

    def _experts(self, args: Arguments) -> mlp.ExpertsMLP:
        return mlp.MLP(args)

    def expert_capacity(self, tokens: int) -> int:
        """Return the most slots that an expert computes; 0 is no limit.

        `tokens` is T on one rank. Of ranks that share the experts it is T K, as MegaBlocks has it.
        """
        ranks = common.expert_ranks(self.args)[1]
        tokens_per_expert = self.top_k * tokens * ranks / self.num_experts
        return min(int(self.args.moe_capacity_factor * tokens_per_expert), sys.maxsize)

    def within_capacity(self, ids: Tensor) -> Tensor:
        """Return ids [T, K] with E for each slot that is past its expert's capacity.

        An expert takes the slots of the first rank first, then those of the next.
        """
        if self.args.moe_capacity_factor == 0:
            return ids
        rank, ranks = common.expert_ranks(self.args)
        slots = ids.flatten().long()
        limits = slots.new_full((self.num_experts,), self.expert_capacity(len(ids)))  # [E]
        earlier = torch.zeros_like(limits)  # [E], slots of earlier ranks
        if ranks > 1:
            capacity = slots.new_tensor([self.expert_capacity(len(slots))])
            counts = torch.bincount(slots, minlength=self.num_experts)
            of_ranks = common.all_gather(torch.cat([counts, capacity]), self.args)  # [ranks, E + 1]
            earlier = of_ranks[:rank, :-1].sum(0)
            limits = of_ranks[:, -1].repeat_interleave(self.num_experts // ranks)
        # within an expert slots ascend, so a slot's place is its rank among those of the expert
        order = slots.argsort(stable=True)
        first = torch.searchsorted(slots[order], slots[order])
        place = torch.zeros_like(slots)
        place[order] = torch.arange(len(slots), device=ids.device) - first
        full = (limits[slots] > 0) & (place + earlier[slots] >= limits[slots])
        return ids.masked_fill(full.view(ids.shape), self.num_experts)

    def forward(
        self, x: Tensor, scores: Tensor, expert_weights: Tensor, top_experts: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, shaped like x [..., D], with `return_bias` beside the bias.

        scores are [T, E], weights and ids [T, K].
        """
        counts = torch.bincount(top_experts.flatten(), minlength=self.num_experts)
        tokens = x.reshape(-1, x.shape[-1])
        y = self.mlp.compute(tokens, self.within_capacity(top_experts), expert_weights)
        if self.training and self.args.moe_loss_weight > 0:
            save_load_balancing_loss((counts, scores))
        y = y.view(x.shape)
        if self.bias is None:
            return y
        return (y, self.bias) if self.args.return_bias else y + self.bias


class MoE(nn.Module):
    """A router, experts with a capacity, and perhaps a shared expert."""

    def __init__(self, args: Arguments):
        super().__init__()
        self.router = router.LearnedRouter(args)
        self.experts = self._init_experts_mlp(args)
        self.shared_expert = None
        if args.shared_expert:
            kind = glu.SharedGLU if args.mlp_type == "glu" else mlp.SharedMLP
            self.shared_expert = kind(args)

    def _init_experts_mlp(self, args: Arguments) -> ParallelMLP:
        return ParallelMLP(args)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, shaped like x [..., D], with `return_bias` beside the bias [D]."""
        x = common.cast_if_autocast_enabled(x)
        scores, expert_weights, top_experts = self.router(x)
        out: Tensor | tuple[Tensor, Tensor]
        out = self.experts(x, scores, expert_weights, top_experts)
        if self.shared_expert is not None and isinstance(out, Tensor):
            return self.shared_expert.add_experts_sharedexpert(self.shared_expert(x), out)
        return out
