"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenyard import Documents
from tokenyard_models.config import TransformerConfig
from tokenyard_models.document_attention import attend_within_documents
from tokenyard_models.fixed_cache import FixedLayerCache
from tokenyard_models.kv_cache import LayerCache
from tokenyard_models.rotary import Rotation, rotate

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(nn.Module):
    """Causal self-attention with fused query, key and value weights.

    Queries and keys are optionally normalised, clipped and rotated.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.clip = config.clip_qkv
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        rows = [heads * config.head_dim for heads in (config.heads, *(config.kv_heads,) * 2)]
        self.fused_rows = {"qkv.weight": tuple(rows)}
        self.qkv = nn.Linear(config.dim, width, bias=config.bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=config.bias)
        self.q_norm = _norm(config, config.heads)
        self.k_norm = _norm(config, config.kv_heads)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | FixedLayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return attention of x [B, S, D], at positions [S], to itself and to the cache.

        With `documents`, each attends to itself, and positions are [B, S]. `rotation` is that of
        the positions; None leaves queries and keys as they are.
        """
        qkv = self._normed(self.qkv(x))  # [B, S, (heads + 2 kv_heads) head_dim]
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        qkv = qkv.transpose(1, 2)  # [B, heads + 2 kv_heads, S, head_dim]
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        y = self._attend_to(q, k, v, positions, cache, documents)  # [B, heads, S, head_dim]
        return self.out(y.transpose(1, 2).flatten(2))

    def _attend_to(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cache: LayerCache | FixedLayerCache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Return attention within documents, to the cache, or to the row."""
        if documents is not None:
            return attend_within_documents(q, k, v, documents)
        if cache is None:
            return self._attend(q, k, v, positions, 0)
        if isinstance(cache, FixedLayerCache):
            return _attend_fixed(q, *cache.append(k, v), cache.position.mask)
        cached = cache.length
        k, v = cache.append(k, v)
        return self._attend_cached(q, k, v, positions, cached)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cached: int) -> Tensor:
        """Return causal attention [B, heads, S, head_dim]; the first `cached` keys are cached."""
        mask = None
        if cached and q.shape[2] > 1:
            mask = positions.unsqueeze(1) >= torch.arange(k.shape[2], device=q.device)  # [S, keys]
        gqa = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not cached, enable_gqa=gqa)

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cached: int
    ) -> Tensor:
        """Attend without cuDNN, which builds a plan for each number of keys: for each new token."""
        with sdpa_kernel(_WITHOUT_CUDNN):
            return self._attend(q, k, v, positions, cached)

    def _normed(self, qkv: Tensor) -> Tensor:
        """Normalise the queries and keys of qkv [B, S, (heads + 2 kv_heads) head_dim]."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        sizes = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = qkv.split(sizes, dim=-1)
        q = _normed_heads(self.q_norm, q)
        k = _normed_heads(self.k_norm, k)
        return torch.cat((q.to(v.dtype), k.to(v.dtype), v), dim=-1)


def _attend_fixed(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return attention [B, heads, 1, head_dim] of one token to all keys that `mask` [keys] allows.

    The queries of a key's group are computed as if they were tokens: no key is copied.
    """
    batch, heads, _, head_dim = q.shape
    grouped = q.reshape(batch, keys.shape[1], -1, head_dim)  # [B, kv_heads, group, head_dim]
    mask = mask.to(q.dtype).expand(*grouped.shape[:3], -1)
    with sdpa_kernel(_WITHOUT_CUDNN):
        y = F.scaled_dot_product_attention(grouped, keys, values, mask)
    return y.reshape(batch, heads, 1, head_dim)


def _norm(config: TransformerConfig, heads: int) -> nn.RMSNorm | None:
    if config.qk_norm is None:
        return None
    groups = heads if config.qk_norm == "all" else 1
    return nn.RMSNorm(config.head_dim * groups, eps=config.norm_eps)


def _normed_heads(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Normalise x [B, S, heads * head_dim] by head, or over all heads together."""
    return norm(x.unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2)
