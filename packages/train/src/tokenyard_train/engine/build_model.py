"""Building a config's model: on the meta device, with backends chosen, laid out by a strategy."""

from __future__ import annotations

import torch

from tokenyard import ConfigError, Model, Strategy, default_registry, started_processes
from tokenyard.model import missing_part
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.precision import BF16_MASTER, COMPUTE_DTYPES, narrow_frozen
from tokenyard_train.engine.trainable import adapt, freeze


def build_model(config: TrainConfig) -> tuple[Strategy, Model]:
    """Return the strategy and the laid-out model, on the meta device. Raises ConfigError."""
    model = meta_model(config)
    if config.lora is not None:
        adapt(model, config.lora)
    freeze(model, config.frozen)
    if config.lora is not None and config.precision == BF16_MASTER:
        narrow_frozen(model)
    choice = config.parallel.strategy
    strategy: Strategy = (
        default_registry().choose("strategy", choice).construct(device=torch.device(config.device))
    )
    ranks = started_processes()
    if strategy.data[1] == 1 and ranks > 1:
        raise ConfigError(
            f"parallel.strategy is {choice!r}, which is for one rank, and {ranks} were "
            "started; give fsdp or ddp, or unset WORLD_SIZE if no launcher set it"
        )
    reason = strategy.unusable(model)
    if reason is not None:
        raise ConfigError(f"parallel.strategy: {reason}")
    return strategy, strategy.layout(model)


def meta_model(config: TrainConfig) -> Model:
    """Build the model on the meta device, with its backends chosen. Raises ConfigError."""
    name = config.model["name"]
    options = {key: value for key, value in config.model.items() if key != "name"}
    chosen = default_registry().choose("model", name)
    _check(name, chosen.backend.load())
    with torch.device("meta"):
        model = chosen.construct(
            options,
            backends=config.backends.model_dump(),
            device=torch.device(config.device),
            compute_dtype=COMPUTE_DTYPES[config.precision],
            expert_parallel=config.parallel.expert_parallel,
        )
    _check(name, model)
    checked: Model = model
    return checked


def _check(name: str, model: object) -> None:
    """Raise ConfigError if a model or its class lacks a part of ``tokenyard.Model``."""
    missing = missing_part(model)
    if missing is not None:
        raise ConfigError(
            f"model.name {name!r}: {missing}; tokenyard.testing.ModelConformance tests all of it"
        )
