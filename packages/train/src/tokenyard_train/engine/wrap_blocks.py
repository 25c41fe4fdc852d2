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
    the backward pass. Whole blocks are recomputed by calling the compiled code again.
    """
    if config.compile and ranks > 1 and has_shards(model):
        raise ConfigError(
            f"compile is true, and the model is sharded over {ranks} ranks; give "
            "parallel.strategy ddp without expert_parallel, or compile false"
        )
    recompute = config.activation_checkpointing
    if recompute == "selective":
        _recompute(model, selective=True)
    if config.compile:
        compile_blocks(model, config.device)
    if recompute is True:
        _recompute(model)
    if config.activation_cpu_offload:
        offload_inputs(model, torch.device(config.device))


def _recompute(model: Model, selective: bool = False) -> None:
    for block in model.blocks:
        block.forward = recomputed(block.forward, selective)
