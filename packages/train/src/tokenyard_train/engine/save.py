"""Saving: the tensors and the metadata of a run's checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard_train.checkpoint import model_tensors, widen
from tokenyard_train.checkpoint.background import BackgroundWriter
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.state import Run
from tokenyard_train.engine.trainable import trainable

_NOT_MOMENTS = ("step", "master")
"""Parts of an optimizer state that run.json and the model's tensors hold."""


def save(run: Run, writer: BackgroundWriter) -> None:
    """Start writing model, optimizer and position as ``ba<batch>``; ``writer.finish()`` waits."""
    states = optimizer_states(run.setup)
    steps = {name: int(state["step"].item()) for name, state in states.items() if "step" in state}
    meta = {
        "batch": run.position.batch,
        "skipped": run.position.skipped_in_a_row,
        "metrics_bytes": run.metrics.size(),
        "optimizer_steps": steps,
        "config": run.setup.config.model_dump(mode="json"),
        "data": run.setup.identity,
        "stop_ids": run.setup.stop_ids,
    }
    base = run.position.base
    if base is not None:
        meta["base"] = base._asdict()
    writer.save(f"ba{run.batch}", run_tensors(run.setup, base is not None), meta)


def run_tensors(setup: Setup, adapters_only: bool = False) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name: to save, or to load before `convert_weights`.

    `adapters_only` leaves out the frozen parameters, which the base of adapters holds.
    """
    tensors = model_tensors(setup.model, adapters_only)
    for name, parameter in setup.model.named_parameters():
        # A checkpoint has the same dtypes in every precision.
        if parameter.requires_grad:
            tensors[f"model.{name}"] = setup.optimizer.master_of(parameter)
        elif parameter.dtype == torch.bfloat16 and not adapters_only:
            tensors[f"model.{name}"] = widen(parameter.detach())
    for name, state in optimizer_states(setup).items():
        moments = [key for key in state if key not in _NOT_MOMENTS]
        tensors |= {f"optimizer.{name}.{key}": state[key] for key in moments}
    return tensors


def optimizer_states(setup: Setup) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state of each trainable parameter, new where no step was taken."""
    return {
        name: setup.optimizer.state_of(parameter)
        for name, parameter in trainable(setup.model).items()
    }
