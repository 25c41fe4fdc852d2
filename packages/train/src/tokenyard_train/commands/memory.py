"""The memory that a run needs on each rank: what it holds exactly, what it computes by formula."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from tokenyard import Model, SavedBytes, ShardingReport, moe_layers
from tokenyard.count import exchange_buffer, weight_copies
from tokenyard.cross_entropy import loss_bytes
from tokenyard.sharded import local_part
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.cuda_graph import uses_graph
from tokenyard_train.engine.optimizer import build_optimizer
from tokenyard_train.engine.precision import BF16_MASTER, COMPUTE_DTYPES

_INPUTS_ON_GPU = 2  # with offload: one that is computed, and one that is copied
_WIDE = 4  # bytes of float32: parameters, gradients, masters


class Memory(NamedTuple):
    """Bytes on one device. The first three are exact."""

    parameters: int
    gradients: int
    optimizer: int  # moments, and masters of bfloat16 weights
    copies: int  # of weights: those in bfloat16 that autocast keeps, and those that kernels keep
    activations: int  # kept for the backward pass of one microbatch
    loss: int  # logits of one chunk, and the gradients of the head
    working_set: int  # what the strategy gathers
    exchange_buffer: int  # that all layers share


def estimate(config: TrainConfig, model: Model, layout: ShardingReport) -> Memory:
    """Estimate the memory of training on one device; `model` is laid out, on any device or meta.

    Activations are ``model.saved_bytes_per_token`` times the tokens of a microbatch.
    """
    parameters = _numel(model.parameters())
    trained = _numel(p for p in model.parameters() if p.requires_grad)
    width = COMPUTE_DTYPES[config.precision].itemsize
    stored = width if config.precision == BF16_MASTER else _WIDE
    masters = _WIDE * trained if stored < _WIDE else 0
    tokens = int(config.device_train_microbatch_size) * config.max_seq_len
    saved = model.saved_bytes_per_token(config.max_seq_len, width)
    held, recomputed = saved_by_blocks(config, saved)
    return Memory(
        parameters=stored * parameters,
        gradients=_gradients(config, model, layout, stored),
        optimizer=build_optimizer(config.optimizer, model).moment_bytes() + masters,
        copies=_copies(config, model, width, stored),
        activations=tokens * (held + recomputed + saved.rest),
        loss=loss_bytes(tokens, model.vocab_size, _head_dim(model), width),
        working_set=layout.working_set,
        exchange_buffer=exchange_buffer(moe_layers(model), tokens, width),
    )


def saved_by_blocks(config: TrainConfig, saved: SavedBytes) -> tuple[int, int]:
    """Return what the forward pass leaves of all blocks, and what the backward pass adds to it.

    Both are bytes per token. With recompute a block leaves its input, and what selective recompute
    keeps. The backward pass computes the rest of one block at a time.
    """
    if not config.activation_checkpointing:
        return sum(saved.blocks), 0
    kept = (0,) * len(saved.blocks)
    if config.activation_checkpointing == "selective":
        kept = saved.kept or saved.blocks
    inputs = _inputs_held(config, len(saved.blocks)) * saved.block_input
    return inputs + sum(kept), max(max(0, b - k) for b, k in zip(saved.blocks, kept))


def offloaded_bytes(config: TrainConfig, model: Model) -> int:
    """Return the bytes of block inputs that a GPU keeps in host memory."""
    width = COMPUTE_DTYPES[config.precision].itemsize
    saved = model.saved_bytes_per_token(config.max_seq_len, width)
    tokens = int(config.device_train_microbatch_size) * config.max_seq_len
    if not (config.activation_cpu_offload and config.device.startswith("cuda")):
        return 0
    return tokens * len(saved.blocks) * saved.block_input


def _inputs_held(config: TrainConfig, blocks: int) -> int:
    """Return the number of block inputs that the device holds at a time."""
    if config.activation_cpu_offload and config.device.startswith("cuda"):
        return min(blocks, _INPUTS_ON_GPU)
    return blocks


def _gradients(config: TrainConfig, model: Model, layout: ShardingReport, stored: int) -> int:
    """Return the bytes of all gradients. `stored` are those of a weight.

    Several microbatches are summed in float32, beside the gradient of the next one: FSDP and
    autograd free it at once, a CUDA graph keeps it. Kernels that add to the sum have none.
    """
    trained = _numel(p for p in model.parameters() if p.requires_grad)
    ranks = math.prod(layout.meshes.get("all but experts", {}).values())
    if config.global_train_batch_size <= ranks * int(config.device_train_microbatch_size):
        return stored * trained
    if not uses_graph(config, model, ranks):
        return _WIDE * trained
    layers = [moe.experts for moe in moe_layers(model)]
    adding = [experts for experts in layers if ranks == 1 and experts.can_add]
    added = _numel(weight for experts in adding for weight in (experts.up, experts.down))
    return _WIDE * trained + stored * (trained - added)


def _head_dim(model: Model) -> int:
    """Return the width D of the head [V, D]."""
    shapes = [p.shape for p in model.parameters() if p.dim() == 2]
    return max((columns for rows, columns in shapes if rows == model.vocab_size), default=0)


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    """Count the numbers that this rank holds."""
    return sum(local_part(p).numel() for p in parameters)


def _copies(config: TrainConfig, model: Model, width: int, stored: int) -> int:
    """Return the bytes of copies of the weights. `stored` are those of a weight."""
    of_autocast = 0 if width == stored else width * _copied(config, model)
    return of_autocast + sum(weight_copies(moe) for moe in moe_layers(model))


def _copied(config: TrainConfig, model: Model) -> int:
    """Count the numbers of the weights that exist as copies at a time.

    Autocast keeps a copy until the forward pass ends. The experts make their own, which recompute
    makes again for one block at a time. Experts that are an FSDP unit make none: they are gathered
    in the compute dtype.
    """
    from torch.distributed.fsdp import FSDPModule  # it takes long to import

    layers = [moe.experts for moe in moe_layers(model)]
    experts = {p for layer in layers for p in layer.parameters()}
    cast = {p for layer in layers if not isinstance(layer, FSDPModule) for p in layer.parameters()}
    by_block = [
        sum(local_part(p).numel() for p in block.parameters() if p in cast)
        for block in model.blocks
    ]
    others = sum(p.numel() for p in model.parameters() if p not in experts)
    at_a_time = max if config.activation_checkpointing else sum
    return others + at_a_time(by_block)
