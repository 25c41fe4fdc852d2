"""One layer of a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenyard import Balance, Documents, FeedForward, MoE
from tokenyard_models.attention import Attention
from tokenyard_models.config import TransformerConfig
from tokenyard_models.fixed_cache import FixedLayerCache
from tokenyard_models.kv_cache import LayerCache
from tokenyard_models.rotary import Rotation


class Block(nn.Module):
    """One layer: attention, then an MoE layer or a dense network.

    Routing leaves it as a Balance only, never as logits [T, E].
    """

    def __init__(self, config: TransformerConfig, ffn: MoE | FeedForward):
        super().__init__()
        self.norm_1 = norm_of(config)
        self.norm_2 = norm_of(config)
        self.attention = Attention(config)
        self.ffn = ffn
        self.forced_balance = config.moe is not None and config.moe.forced_balance

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | FixedLayerCache | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Balance | None]:
        """Return x [B, S, D] and the Balance of an MoE layer."""
        x = x + self.attention(self.norm_1(x), positions, rotation, cache, documents)
        if not isinstance(self.ffn, MoE):
            return x + self.ffn(self.norm_2(x)), None
        padding = None if documents is None else documents.padding.flatten()
        y, routing = self.ffn(self.norm_2(x), self._forced_ids(x), padding)
        if isinstance(cache, FixedLayerCache):
            return x + y, None  # generating reads no Balance
        balance = self.ffn.router.balance
        return x + y, balance(routing) if padding is None else balance(routing, padding)

    def _forced_ids(self, x: Tensor) -> Tensor | None:
        """Return ids [T, K] that take experts in turn, if the config asks for forced balance."""
        if not self.forced_balance or not isinstance(self.ffn, MoE):
            return None
        experts = self.ffn.workload.num_experts
        top_k = self.ffn.workload.top_k
        tokens = x.shape[0] * x.shape[1]
        slots = torch.arange(tokens * top_k, device=x.device)
        return slots.remainder(experts).view(tokens, top_k)


def norm_of(config: TransformerConfig) -> nn.Module:
    """Return a norm of the model width, as the config says."""
    if config.norm == "rms":
        return nn.RMSNorm(config.dim, eps=config.norm_eps)
    return nn.LayerNorm(config.dim, eps=config.norm_eps, bias=config.bias)
