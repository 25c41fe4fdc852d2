"""The bytes that a transformer keeps for the backward pass, per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenyard import FeedForward, MoE, SavedBytes
from tokenyard.count import kept_by_ffn, saved_by_ffn
from tokenyard_models.config import TransformerConfig

_WIDE = 4  # bytes of float32


class Widths(NamedTuple):
    """Bytes of a number."""

    compute: int  # in matmuls
    stream: int  # between blocks, in the dtype of the weights


def saved_bytes(
    config: TransformerConfig, ffns: Sequence[MoE | FeedForward], widths: Widths, fused_norms: bool
) -> SavedBytes:
    """Return what the backward pass needs of a token.

    b are the bytes of the compute dtype, and s those of the stream. A norm saves its input and its
    output, sD + bD. An RMSNorm does so as a fused kernel, and else saves its input in float32 and
    4D more. Selective recompute keeps the results of attention's two projections and of the matmul
    of scores and values, and those of the FFN. `ffns` are those of the blocks.
    """
    width, stream = widths
    composed = config.norm == "rms" and not fused_norms
    norm = ((2 * _WIDE if composed else stream) + width) * config.dim
    attention = _saved_by_attention(config, width, fused_norms and width == stream)
    kept_attention = _kept_of_attention(config, width)
    return SavedBytes(
        tuple(2 * norm + attention + saved_by_ffn(ffn, width) for ffn in ffns),
        block_input=stream * config.dim,
        rest=norm,
        kept=tuple(kept_attention + kept_by_ffn(ffn, width) for ffn in ffns),
    )


def _saved_by_attention(config: TransformerConfig, width: int, fused_norms: bool) -> int:
    """Count the bytes per token that attention keeps for the backward pass.

    b is `width`; Q and V are the widths of all heads and of all key-value heads. The projection
    keeps b(Q + 2V), as much again if it is clipped, and b(Q + V) if it is rotated. Queries and
    the result keep 2bQ. A norm of queries and keys keeps b(Q + 2V), and 4(Q + V) if it is not
    fused.
    """
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    projected = queries + 2 * keys
    clipped = 0 if config.clip_qkv is None else projected
    rotated = 0 if config.rope_theta is None else queries + keys
    in_float32 = 0 if fused_norms else _WIDE * (queries + keys)
    normed = 0 if config.qk_norm is None else in_float32 + width * projected
    return width * (projected + clipped + rotated + 2 * queries) + normed


def _kept_of_attention(config: TransformerConfig, width: int) -> int:
    """Count the bytes per token that selective recompute keeps of attention: b(2Q + 2V + D) + 4H.

    H heads have one float32 each, the logarithm of the softmax's sum.
    """
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    return width * (2 * queries + 2 * keys + config.dim) + _WIDE * config.heads
