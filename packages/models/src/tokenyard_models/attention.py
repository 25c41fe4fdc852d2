"""Grouped-query attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenyard_models.config import TransformerConfig
from tokenyard_models.kv_cache import LayerCache
from tokenyard_models.rotary import rotate

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(nn.Module):
    """Causal self-attention: one fused projection, normalised and clipped if asked, rotated, a scaled dot product.

    Ainslie et al. 2023 (grouped queries, arXiv 2305.13245).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.clip, self.theta, self.scaling = (
            config.clip_qkv,
            config.rope_theta,
            config.rope_scaling,
        )
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.dim, width, bias=config.bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=config.bias)
        self.q_norm, self.k_norm = (
            _norm(config, heads) for heads in (config.heads, config.kv_heads)
        )

    def forward(self, x: Tensor, positions: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attend from x [B, S, D] at positions [S] to itself and to what the cache holds."""
        qkv = self._normed(self.qkv(x))
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        qkv = qkv.unflatten(-1, (-1, self.head_dim)).transpose(
            1, 2
        )  # [B, heads + 2 kv_heads, S, head_dim]
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.theta is not None:
            qk = rotate(qk, positions, self.theta, self.scaling)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        before = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(k, v)
        attend = self._attend if cache is None else self._attend_cached
        y = attend(q, k, v, positions, before)
        return self.out(y.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, before: int) -> Tensor:
        """Return [B, heads, S, head_dim]. `before` keys come from the cache; a position sees all up to itself."""
        mask = None
        if before and q.shape[2] > 1:
            mask = positions.unsqueeze(1) >= torch.arange(k.shape[2], device=q.device)  # [S, keys]
        gqa = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not before, enable_gqa=gqa)

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, before: int
    ) -> Tensor:
        """Attend without cuDNN, which builds a new plan for every number of keys, so for every new token."""
        with sdpa_kernel(_WITHOUT_CUDNN):
            return self._attend(q, k, v, positions, before)

    def _normed(self, qkv: Tensor) -> Tensor:
        """Normalise the queries and keys among qkv [B, S, (heads + 2 kv_heads) head_dim]."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        sizes = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = qkv.split(sizes, dim=-1)
        q, k = (
            norm(t.unflatten(-1, (-1, *norm.normalized_shape)))
            for norm, t in ((self.q_norm, q), (self.k_norm, k))
        )
        return torch.cat((q.flatten(-2).to(v.dtype), k.flatten(-2).to(v.dtype), v), dim=-1)


def _norm(config: TransformerConfig, heads: int) -> nn.RMSNorm | None:
    if config.qk_norm is None:
        return None
    return nn.RMSNorm(
        config.head_dim * (heads if config.qk_norm == "all" else 1), eps=config.norm_eps
    )
