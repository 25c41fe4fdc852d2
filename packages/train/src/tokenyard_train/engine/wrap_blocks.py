"""Wrap the blocks of a model: recompute, torch.compile and offload of their inputs."""

from __future__ import annotations

import torch

from tokenyard import ConfigError, Model
from tokenyard.recompute import recomputed
from tokenyard.sharded import has_shards
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.compile import compile_blocks
from tokenyard_train.engine.offload import offload_inputs


def wrap_blocks(config: TrainConfig, model: Model, ranks: int) -> None:
    """Wrap the forward pass of each block as the config asks. Raises ConfigError.

    Selective recompute is inside the compiled code, so that what is computed again is fused with
    the backward pass. Whole blocks are recomputed by calling the compiled code again. The compiler
    cannot look into a recomputed block whose sharded experts run eagerly.
    """
    sharded = ranks > 1 and has_shards(model)
    recompute = config.activation_checkpointing
    if config.compile and sharded and recompute == "selective":
        raise ConfigError(
            "compile is true, activation_checkpointing is selective, and the model is sharded over "
            f"{ranks} ranks; give activation_checkpointing true or false, or compile false"
        )
    if recompute == "selective":
        _recompute(model, selective=True)
    if config.compile:
        compile_blocks(model, config.device, eager_experts=sharded)
    if recompute is True:
        _recompute(model)
    if config.activation_cpu_offload:
        offload_inputs(model, torch.device(config.device))


def _recompute(model: Model, selective: bool = False) -> None:
    for block in model.blocks:
        block.forward = recomputed(block.forward, selective)
