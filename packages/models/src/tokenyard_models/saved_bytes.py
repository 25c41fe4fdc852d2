"""The bytes that a transformer keeps for the backward pass, per token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenyard import FeedForward, MoE, SavedBytes
from tokenyard.count import kept_by_ffn, saved_by_ffn
from tokenyard_models.config import TransformerConfig

_WIDE = 4  # bytes of float32


def saved_bytes(
    config: TransformerConfig, ffns: Sequence[MoE | FeedForward], width: int, stream: int
) -> SavedBytes:
    """Return what the backward pass needs of a token, for a compute dtype of `width` bytes.

    `stream` are the bytes of a number between blocks, in the dtype of the weights. A norm saves its
    input and its output, and RMSNorm its input in float32 and 4D more. Selective recompute keeps
    the results of attention's two projections and of the matmul of scores and values, and those of
    the FFN. `ffns` are those of the blocks.
    """
    inside = 2 * _WIDE if config.norm == "rms" else stream
    norm = (inside + width) * config.dim
    attention = _saved_by_attention(config, width)
    kept_attention = _kept_of_attention(config, width)
    return SavedBytes(
        tuple(2 * norm + attention + saved_by_ffn(ffn, width) for ffn in ffns),
        block_input=stream * config.dim,
        rest=norm,
        kept=tuple(kept_attention + kept_by_ffn(ffn, width) for ffn in ffns),
    )


def _saved_by_attention(config: TransformerConfig, width: int) -> int:
    """Count the bytes per token that attention keeps for the backward pass.

    b is `width`; Q and V are the widths of all heads and of all key-value heads. The projection
    keeps b(Q + 2V), as much again if it is clipped, and b(Q + V) if it is rotated. Queries and
    the result keep 2bQ. A norm of queries and keys keeps 4(Q + V) and b(Q + 2V).
    """
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    projected = queries + 2 * keys
    clipped = 0 if config.clip_qkv is None else projected
    rotated = 0 if config.rope_theta is None else queries + keys
    normed = 0 if config.qk_norm is None else _WIDE * (queries + keys) + width * projected
    return width * (projected + clipped + rotated + 2 * queries) + normed


def _kept_of_attention(config: TransformerConfig, width: int) -> int:
    """Count the bytes per token that selective recompute keeps of attention: b(2Q + 2V + D) + 4H.

    H heads have one float32 each, the logarithm of the softmax's sum.
    """
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    return width * (2 * queries + 2 * keys + config.dim) + _WIDE * config.heads
