"""Everything that a run works on, built from a config.

The fields of a Setup are never reassigned. Weights and optimizer states change in place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from tokenyard import Model, MoE, Strategy, moe_layers
from tokenyard.count import training_flops_per_token
from tokenyard.sharded import allocate
from tokenyard_train.config.duration import Span
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data, build_data
from tokenyard_train.data.stop_ids import tokenizer_stop_ids
from tokenyard_train.distributed import is_rank0
from tokenyard_train.engine.build_model import build_model
from tokenyard_train.engine.cuda_graph import MicrobatchGraph, uses_graph
from tokenyard_train.engine.expert_sums import ExpertSums
from tokenyard_train.engine.optimizer import Optimizer, build_optimizer
from tokenyard_train.engine.out_of_memory import check_batch_fits
from tokenyard_train.engine.precision import BF16_MASTER, computing_in
from tokenyard_train.engine.reader import Reader
from tokenyard_train.engine.run_length import run_batches, span_batches
from tokenyard_train.engine.table_versions import choose_versions
from tokenyard_train.engine.wrap_blocks import wrap_blocks
from tokenyard_train.launch.faults import write_timeout


@dataclass(frozen=True)
class Setup:
    """A run's config and the objects built from it."""

    config: TrainConfig
    console: Console  # quiet on all ranks but 0
    folder: Path
    strategy: Strategy
    model: Model
    optimizer: Optimizer
    data: Data
    graph: MicrobatchGraph | None  # None: microbatches run without a CUDA graph
    sums: ExpertSums  # of gradients over several microbatches
    batches: int  # optimizer steps of the whole run
    flops_per_token: float  # of training: forward and backward

    @cached_property
    def reader(self) -> Reader:
        """The reader of this rank's microbatches."""
        return Reader(self.config, self.data, self.strategy)

    @property
    def replays(self) -> bool:
        """Whether ranks replay microbatches as a CUDA graph. All ranks say the same."""
        return self.graph is not None and self.graph.agreed

    def on_any_rank(self, flag: bool) -> bool:
        """Return whether a flag is true on any rank. All ranks call this, and the host waits."""
        return _on_any_rank(self.strategy, self.config.device, flag)

    @cached_property
    def modules(self) -> list[nn.Module]:
        """All modules of the model."""
        return list(self.model.modules())

    @cached_property
    def layers(self) -> list[MoE]:
        """The MoE layers of the model."""
        return moe_layers(self.model)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of the tokenizer and of the training text, by config key."""
        return self.data.identity()

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids beside the tokenizer that end a document."""
        return sorted(tokenizer_stop_ids(self.config.tokenizer))

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.config.device)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.config.global_train_batch_size * self.config.max_seq_len

    def steps_in(self, span: Span) -> int:
        """Return a span of training in optimizer steps of this run."""
        return span_batches(span, self.config, self.data, self.batches)

    def due(self, interval: Span | None, batch: int) -> bool:
        """Return whether an interval ends after so many steps. None never ends."""
        return interval is not None and batch % max(1, self.steps_in(interval)) == 0

    def convert_weights(self) -> None:
        """Convert the weights to the config's precision. Call it once, after they were loaded."""
        if self.config.precision == BF16_MASTER:
            self.optimizer.narrow_weights(self.model)

    def precision(self) -> AbstractContextManager[None]:
        """Return a context that computes in the config's `precision`."""
        return computing_in(self.config.precision, self.device)


def build_setup(
    config: TrainConfig, console: Console, check: Callable[[Model, Data], None] | None = None
) -> Setup:
    """Build a run's setup from a resolved config, with the versions of its tables. Writes nothing.

    `check` receives the model on the meta device and the data, and may raise ConfigError. Raises
    TokenyardError.
    """
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)
    strategy, model = build_model(config)
    write_timeout()
    check_batch_fits(config, strategy.data[1])
    config = choose_versions(config)
    data = build_data(config.data())
    if check is not None:
        check(model, data)
    graphed = uses_graph(config, model, strategy.data[1])
    _prepare_kernels(config, model, strategy.data[1])
    allocate(model, config.device)
    model.init_weights(config.seed)
    wrap_blocks(config, model, strategy.data[1])
    batches = run_batches(config, data)
    optimizer = build_optimizer(config.optimizer, model)
    sums = ExpertSums(model, strategy.data[1], keep=graphed)
    return Setup(
        config=config,
        console=console if is_rank0() else Console(quiet=True),
        folder=Path(config.save_folder or "."),
        strategy=strategy,
        model=model,
        optimizer=optimizer,
        data=data,
        graph=_microbatch_graph(config, strategy, model, sums) if graphed else None,
        sums=sums,
        batches=batches,
        flops_per_token=training_flops_per_token(model, config.max_seq_len),
    )


def _prepare_kernels(config: TrainConfig, model: Model, ranks: int) -> None:
    """Compile the kernels of the first step. All MoE layers of a model launch the same ones."""
    layers = moe_layers(model)
    if layers and config.device.startswith("cuda"):
        rows = int(config.device_train_microbatch_size)
        several = config.global_train_batch_size > ranks * rows
        layers[0].prepare(rows * config.max_seq_len, sums=several and ranks == 1)


def _microbatch_graph(
    config: TrainConfig, strategy: Strategy, model: Model, sums: ExpertSums
) -> MicrobatchGraph:
    if strategy.data[1] == 1:
        return MicrobatchGraph(model, sums.paused)
    return MicrobatchGraph(model, sums.paused, partial(_on_any_rank, strategy, config.device))


def _on_any_rank(strategy: Strategy, device: str, flag: bool) -> bool:
    if strategy.data[1] == 1:
        return flag
    return bool(strategy.reduce(torch.tensor(float(flag), device=device)).item())
