"""Everything that a run holds, built from a config."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.checkpoint import checkpoint

from tokenyard import ConfigError, default_registry, moe_layers, started_processes
from tokenyard.sharded import allocate
from tokenyard_models import flops_per_token
from tokenyard_train.checkpoint import checkpoints
from tokenyard_train.checkpoint.background import Saver
from tokenyard_train.config.duration import Span
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data, build_data
from tokenyard_train.distributed import is_first, on_first
from tokenyard_train.engine.optimizer import AdamW, build_optimizer
from tokenyard_train.engine.phases import Phases, untimed
from tokenyard_train.engine.precision import COMPUTE_DTYPES, computing_in
from tokenyard_train.engine.trainable import adapt, freeze
from tokenyard_train.launch.faults import note_began
from tokenyard_train.records.metrics import Metrics, Unwritten


@dataclass
class Run:
    """A run in progress: what it was asked, what it works on, and how far it is."""

    config: TrainConfig
    console: Console
    folder: Path
    strategy: Any
    model: Any
    optimizer: AdamW
    data: Data
    metrics: Metrics
    saver: Saver
    batches: int  # optimizer steps of the whole run
    flops_per_token: float
    batch: int = 0  # optimizer steps done
    skipped: int = 0  # steps in a row that were not taken
    asked: bool = False  # this process was asked to stop
    stop: bool = False  # some process was, and all of them stop after this step
    unsaved: bool = False  # some process could not write its part of a checkpoint
    phase: Phases = untimed  # around the parts of a step

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.config.device)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.config.global_train_batch_size * self.config.max_seq_len

    def span(self, span: Span) -> int:
        """Return a span of training in optimizer steps of this run."""
        return span.batches(self.batch_tokens, epoch_batches(self.config, self.data), self.batches)

    def due(self, interval: Span | None) -> bool:
        """Say whether the step just done ends an interval."""
        return interval is not None and self.batch % max(1, self.span(interval)) == 0

    def precision(self) -> AbstractContextManager[None]:
        """Compute as `precision` says."""
        return computing_in(self.config.precision, self.device)


def build_run(config: TrainConfig, console: Console) -> Run:
    """Build a run from a resolved config; the folder is prepared last, when nothing in the config can fail any more."""
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)
    strategy, model = build_model(config)
    data = build_data(config.data())
    _prepare_kernels(config, model)
    allocate(model, config.device)
    model.init_weights(config.seed)
    if config.activation_checkpointing:
        _recompute_blocks(model)
    batches = run_batches(config, data)
    folder = Path(on_first(lambda: str(_prepare(config))))
    note_began()
    metrics = (Metrics if is_first() else Unwritten)(folder / "metrics.jsonl")
    return Run(
        config,
        console if is_first() else Console(quiet=True),
        folder,
        strategy,
        model,
        build_optimizer(config.optimizer, model),
        data,
        metrics,
        Saver(
            folder,
            config.save_num_checkpoints_to_keep,
            config.save_async,
            torch.device(config.device),
        ),
        batches,
        flops_per_token(model, config.max_seq_len, training=True),
    )


def build_model(config: TrainConfig) -> tuple[Any, Any]:
    """Return the strategy and the model, laid out, on the meta device."""
    model = meta_model(config)
    if config.lora is not None:
        adapt(model, config.lora)
    freeze(model, config.frozen)
    registry = default_registry()
    strategy = registry.choose("strategy", config.parallel.strategy).construct(
        device=torch.device(config.device)
    )
    processes, asked = started_processes(), config.parallel.strategy
    if strategy.data[1] == 1 and processes > 1:
        raise ConfigError(
            f"parallel.strategy is {asked!r}, which is for one process, and {processes} were started; give fsdp or ddp"
        )
    reason = strategy.unusable(model)
    if reason is not None:
        raise ConfigError(f"parallel.strategy: {reason}")
    return strategy, strategy.layout(model)


def meta_model(config: TrainConfig) -> Any:
    """Build the model on the meta device, with its backends chosen."""
    options = {key: value for key, value in config.model.items() if key != "name"}
    chosen = default_registry().choose("model", config.model["name"])
    with torch.device("meta"):
        return chosen.construct(
            options,
            backends=config.backends.model_dump(),
            device=torch.device(config.device),
            compute_dtype=COMPUTE_DTYPES[config.precision],
            expert_parallel=config.parallel.expert_parallel,
        )


def run_batches(config: TrainConfig, data: Data) -> int:
    """Return the optimizer steps of the whole run. Raises ConfigError if there are none."""
    tokens = config.global_train_batch_size * config.max_seq_len
    batches = config.max_duration.batches(tokens, epoch_batches(config, data))
    if batches < 1:
        raise ConfigError(
            f"max_duration is {config.max_duration}, which is less than one batch of {tokens} tokens"
        )
    return batches


def epoch_batches(config: TrainConfig, data: Data) -> int:
    """Return the optimizer steps of one epoch; what does not fill a last one is seen first in the next epoch."""
    return max(1, len(data.train) // config.global_train_batch_size)


def _prepare_kernels(config: TrainConfig, model: Any) -> None:
    """Compile what the first step will launch. All MoE layers of a model launch the same kernels."""
    layers = moe_layers(model)
    if layers and config.device.startswith("cuda"):
        layers[0].prepare(int(config.device_train_microbatch_size) * config.max_seq_len)


def _recompute_blocks(model: Any) -> None:
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _prepare(config: TrainConfig) -> Path:
    """Return the run's folder, refusing one that holds a run unless that is to be resumed or overwritten."""
    folder = Path(config.save_folder or ".")
    taken = (folder / "metrics.jsonl").exists() or bool(checkpoints(folder))
    if taken and not config.autoresume:
        if not config.save_overwrite:
            raise ConfigError(
                f"save_folder {str(folder)!r} holds a run already; set autoresume: true to go on with it, "
                "save_overwrite: true to delete it, or another run_name"
            )
        for path in [folder / "metrics.jsonl", folder / "trackers.json", *checkpoints(folder)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"save_folder {str(folder)!r} cannot be made: {error.strerror}") from None
    return folder
