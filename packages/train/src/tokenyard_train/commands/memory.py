"""How much memory a run needs on each of its processes: what it holds exactly, the rest by formula.

Notation: D model width, Q and V the widths of all heads and of all key-value heads, K experts a token, E experts, U the
rows of an up projection (2F when gated, else F), b bytes of a number in the compute dtype (4, or 2 under amp_bf16).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokenyard import FeedForward, Layout, MoE, is_gated, moe_layers
from tokenyard.sharded import is_sharded, local_part
from tokenyard_models import TransformerConfig
from tokenyard_train.config.schema import TrainConfig

_WIDE = 4  # bytes of a float32: parameters, gradients, the optimizer's moments, the stream between blocks


class Memory(NamedTuple):
    """Bytes on one device; the first three are exact."""

    parameters: int
    gradients: int
    optimizer: int  # AdamW's two moments
    copies: int  # of the weights in bfloat16, which autocast keeps from the forward to the backward pass
    activations: int  # saved for the backward pass of one microbatch
    logits: int  # themselves, in float32, and their gradient
    working_set: int  # what the strategy gathers


def estimate(config: TrainConfig, model: Any, layout: Layout) -> Memory:
    """Estimate the memory of training a laid-out model (on the meta device, say) on one device.

    Activations are what a token saves, times the tokens of a microbatch. Each norm saves its input and its output,
    4D + bD (RMSNorm 4D more). Attention saves b(Q + 2V), as much again if it is clipped, b(Q + V) if rotated, and 2bQ.
    An MoE layer whose kernel saves its input and the pre-activation, as core's does, saves bKU and some 12E + 28K for
    its routing (under autocast 4D more, for the router). A dense layer or a shared expert saves b(U + F), or b(U + 2F)
    when gated. Recomputing blocks leaves 4D of each, and one of them in full. Of each row that an exchange
    brings, bD is saved.
    """
    held, trained = (
        _numbers(model.parameters()),
        _numbers(p for p in model.parameters() if p.requires_grad),
    )
    width = 2 if config.precision == "amp_bf16" else _WIDE
    tokens = int(config.device_train_microbatch_size) * config.max_seq_len
    norm = (_WIDE + width + (_WIDE if model.config.norm == "rms" else 0)) * model.config.dim
    blocks = [
        2 * norm + _attention(model.config, width) + _ffn(block.ffn, width)
        for block in model.blocks
    ]
    saved = sum(blocks)
    if config.activation_checkpointing:
        saved = len(blocks) * _WIDE * model.config.dim + max(blocks)
    return Memory(
        parameters=_WIDE * held,
        gradients=_WIDE * trained,
        optimizer=2 * _WIDE * trained,
        copies=0 if width == _WIDE else width * _copied(model),
        activations=tokens * (saved + norm),
        logits=tokens * model.config.vocab_size * (width + 2 * _WIDE),
        working_set=layout.working_set,
    )


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    """Count the numbers that this rank holds."""
    return sum(local_part(p).numel() for p in parameters)


def _copied(model: nn.Module) -> int:
    """Count the numbers of the weights that autocast copies: not of sharded experts, which are gathered narrow."""
    gathered: set[Tensor] = {
        p for m in moe_layers(model) for p in m.experts.parameters() if is_sharded(p)
    }
    return sum(p.numel() for p in model.parameters() if p not in gathered)


def _attention(config: TransformerConfig, width: int) -> int:
    heads, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
    projected = heads + 2 * shared
    clipped = projected if config.clip_qkv is not None else 0
    rotated = heads + shared if config.rope_theta is not None else 0
    return width * (projected + clipped + rotated + 2 * heads)


def _ffn(ffn: MoE | FeedForward, width: int) -> int:
    if isinstance(ffn, FeedForward):
        return _dense(ffn, width)
    work = ffn.workload
    rows = ffn.experts.up.shape[1]
    routing = 12 * work.num_experts + 28 * work.top_k + (_WIDE * work.dim if width < _WIDE else 0)
    shared = _dense(ffn.shared, width) if ffn.shared is not None else 0
    return (
        width * work.top_k * rows
        + routing
        + shared
        + round(width * work.dim * ffn.experts.exchange.received)
    )


def _dense(ffn: FeedForward, width: int) -> int:
    rows, ffn_dim = ffn.up.shape[0], ffn.down.shape[1]
    return width * (rows + (2 if is_gated(ffn.activation) else 1) * ffn_dim)
