"""MegaBlocks' router, and the z-loss of all routers."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokenyard import ConfigError
from tokenyard_models.megablocks.layers import common
from tokenyard_models.megablocks.layers.arguments import Arguments

_ROUTER_LOGITS: list[Tensor] = []  # of this forward pass: MegaBlocks' API collects them here


def clear_router_zloss() -> None:
    """Forget the logits of the last forward pass."""
    _ROUTER_LOGITS.clear()


def batched_router_zloss(args: Arguments) -> Tensor | float:
    """Return the weighted z-loss of each router [L]. Raises ConfigError if none was saved."""
    if args.moe_zloss_weight == 0:
        warnings.warn("moe_zloss_weight is 0, so there is no z-loss", stacklevel=2)
        return 0
    if not _ROUTER_LOGITS:
        raise ConfigError("no router has saved logits; call batched_router_zloss after the forward")
    common.warn_without_gradient("the z-loss", _ROUTER_LOGITS)
    losses = [logits.logsumexp(dim=1).square().mean() for logits in _ROUTER_LOGITS]
    return args.moe_zloss_weight * torch.stack(losses)


class LearnedRouter(nn.Module):
    """Chooses K experts for each token. The weight is ``layer.weight`` [E, D].

    The logits are computed in float32, by tokenyard's router.
    """

    def __init__(self, args: Arguments):
        super().__init__()
        self.args = args
        self.layer = nn.Linear(
            args.hidden_size,
            args.moe_num_experts,
            bias=False,
            dtype=common.dtype(args),
            device=args.device,
        )
        with torch.no_grad():
            args.init_method(self.layer.weight)
        self._parts = common.PartsCache(args)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores [T, E], weights [T, K] and ids [T, K] for x [..., D]."""
        tokens = x.reshape(-1, x.shape[-1])
        router = self._parts.of(tokens).router.train(self.training)
        ids, weights, logits = functional_call(router, {"weight": self.layer.weight}, (tokens,))
        if self.args.moe_zloss_weight:
            common.save(_ROUTER_LOGITS, logits)
        if self.args.uniform_expert_assignment:
            slots = torch.arange(ids.numel(), dtype=ids.dtype, device=ids.device)
            ids = slots.remainder(self.args.moe_num_experts).view(ids.shape)
        return logits.softmax(dim=-1), weights, ids
