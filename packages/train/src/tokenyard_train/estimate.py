"""How much memory a run needs, by formula."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenyard import MoE, up_rows
from tokenyard_models import count_parameters
from tokenyard_train.config.schema import TrainConfig


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float  # saved for the backward pass of one microbatch
    logits: float


def estimate(config: TrainConfig, model: Any) -> Memory:
    """Estimate the memory of training on one device.

    Parameters, gradients and AdamW's two moments take 4 bytes each. With S tokens in a microbatch and b bytes a number
    (4, or 2 under amp_bf16), an attention layer saves about S b (5 D + 2 (heads + 2 kv_heads) head_dim), an MoE layer
    S b (2 D + K 2F), and a dense one S b (2 D + 3F); recomputing blocks leaves S b D a layer and one layer in full.
    Logits take S V (b + 8): themselves, in float32, and their gradient.
    """
    numbers = count_parameters(model).total
    width = 2 if config.precision == "amp_bf16" else 4
    tokens = int(config.device_train_microbatch_size) * config.max_seq_len
    layers = [tokens * width * (_attention(model.config) + _ffn(model.config, block.ffn)) for block in model.blocks]
    saved = sum(layers)
    if config.activation_checkpointing:
        saved = len(layers) * tokens * width * model.config.dim + max(layers)
    logits = tokens * model.config.vocab_size * (width + 8)
    return Memory(4.0 * numbers, 4.0 * numbers, 8.0 * numbers, float(saved), float(logits))


def _attention(config: Any) -> int:
    return int(5 * config.dim + 2 * (config.heads + 2 * config.kv_heads) * config.head_dim)


def _ffn(config: Any, ffn: Any) -> int:
    if isinstance(ffn, MoE):
        work = ffn.workload
        return int(2 * work.dim + work.top_k * up_rows(work.activation, work.ffn_dim))
    return int(2 * config.dim + 3 * (config.dense_ffn_dim or 4 * config.dim))
