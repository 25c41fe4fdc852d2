"""What a config will cost, without running it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tokenyard import moe_layers
from tokenyard_models import count_parameters, flops_per_token
from tokenyard_train.build import build_model, epoch_batches
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import build_data
from tokenyard_train.estimate import estimate


def check(config: TrainConfig, console: Console) -> None:
    """Print model size, work, memory, data and backends of a resolved config. Raises TokenyardError for a mistake."""
    strategy, model = build_model(config, allocate=False)
    data = build_data(config)
    table = Table("", "", title=config.run_name, show_header=False)
    for name, value in [*_model_rows(config, model), *_data_rows(config, data), *_memory_rows(config, model)]:
        table.add_row(name, value)
    table.add_row("strategy", f"{_strategy_name(config)} (data rank {strategy.data[0]} of {strategy.data[1]})")
    console.print(table)
    _print_backends(model, console)


def _model_rows(config: TrainConfig, model: Any) -> list[tuple[str, str]]:
    size = count_parameters(model)
    forward, training = (flops_per_token(model, config.max_seq_len, training=t) for t in (False, True))
    return [
        ("model", config.model["name"]),
        ("parameters", f"{size.total:,} ({size.experts:,} in experts)"),
        ("active parameters", f"{size.active:,} for each token"),
        ("FLOPs per token", f"{_count(forward)} forward, {_count(training)} training"),
    ]


def _data_rows(config: TrainConfig, data: Any) -> list[tuple[str, str]]:
    tokens = config.global_train_batch_size * config.max_seq_len
    epoch, microbatch = epoch_batches(config, data), config.device_train_microbatch_size
    batches = config.max_duration.batches(tokens, epoch)
    held_out = len(data.held_out.predicted) if data.held_out is not None else 0
    return [
        ("training text", f"{len(data.train.tokens):,} tokens, {len(data.train):,} samples of {config.max_seq_len}"),
        ("held-out text", f"{held_out:,} tokens scored"),
        ("batch", f"{tokens:,} tokens: {config.global_train_batch_size} samples, {microbatch} in one forward pass"),
        ("duration", f"{batches:,} batches, {batches / epoch:.2f} epochs, {_count(batches * tokens)} tokens"),
    ]


def _memory_rows(config: TrainConfig, model: Any) -> list[tuple[str, str]]:
    memory = estimate(config, model)
    parts = ", ".join(f"{name} {_bytes(value)}" for name, value in memory._asdict().items())
    return [("memory (estimate)", f"{_bytes(sum(memory))}: {parts}")]


def _strategy_name(config: TrainConfig) -> str:
    strategy = config.parallel.strategy
    return strategy if isinstance(strategy, str) else str(strategy.get("name"))


def _print_backends(model: Any, console: Console) -> None:
    layers = moe_layers(model)
    if not layers:
        return
    table = Table("part", "backend", "passed over", title=f"backends of {len(layers)} MoE layers")
    for part, chosen in layers[0].chosen.items():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in chosen.passed_over.items())
        table.add_row(part, chosen.backend.name, reasons or "-")
    console.print(table)


def _count(value: float) -> str:
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {suffix}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for scale, suffix in ((2**30, "GiB"), (2**20, "MiB")):
        if value >= scale:
            return f"{value / scale:.2f} {suffix}"
    return f"{value / 2**10:.1f} KiB"
