"""Report the size, cost, layout and backends of a config without running it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenyard import (
    BackendChoice,
    Model,
    MoE,
    ShardingReport,
    count_parameters,
    default_registry,
    moe_layers,
)
from tokenyard.count import (
    keeps_weight_copies,
    saved_by_row,
    training_flops_per_token,
    weight_copies,
)
from tokenyard.devices import device_memory
from tokenyard.units import counted, describe_bytes, describe_count
from tokenyard_train.callbacks import build_callbacks, build_registration
from tokenyard_train.commands.host_time import why_ranks_lose
from tokenyard_train.commands.memory import estimate, offloaded_bytes
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data, build_data
from tokenyard_train.engine.build_model import build_model
from tokenyard_train.engine.cuda_graph import uses_graph
from tokenyard_train.engine.deterministic import COST
from tokenyard_train.engine.out_of_memory import check_batch_fits, out_of_memory_is_a_mistake
from tokenyard_train.engine.precision import BF16_MASTER, COMPUTE_DTYPES, narrow
from tokenyard_train.engine.resume import check_load_path
from tokenyard_train.engine.run_length import run_batches, schedule_warnings
from tokenyard_train.engine.run_training import check_run
from tokenyard_train.engine.summary import describe_tokenizer
from tokenyard_train.engine.table_versions import choose_versions, table_versions
from tokenyard_train.engine.trainable import describe_trainable
from tokenyard_train.optional import require

log = logging.getLogger("tokenyard")

Rows = Iterator[tuple[str, str]]


def check(config: TrainConfig, console: Console) -> None:
    """Print a table of model size, data, layout, memory and backends for a resolved config.

    The model stays on the meta device, so a small machine can check a large model. The GPU of the
    config may be one of another machine. Raises TokenyardError for a mistake in the config.
    """
    with out_of_memory_is_a_mistake(config):
        strategy, model = build_model(config)
    check_batch_fits(config, strategy.data[1])
    uses_graph(config, model, strategy.data[1])  # raises if it cannot
    if config.load_path is not None:
        check_load_path(config.load_path)
    config = choose_versions(config)
    data = build_data(config.data())
    callbacks = [*build_callbacks(config.callbacks), *build_registration(config.loggers)]
    check_run(config, callbacks, model, data)
    for warning in schedule_warnings(config, data):
        log.warning("%s", warning)
    if config.precision == BF16_MASTER:
        narrow(model)
    layout = strategy.describe(model)
    table = Table(show_header=False, box=box.SIMPLE_HEAD)
    _add(table, "model", _model_rows(config, model))
    _add(table, "data", _data_rows(config, data, strategy.data[1]))
    _add(table, f"layout over {_ranks(strategy.data[1])}", _layout_rows(config, layout))
    _add(table, "memory of a rank (estimate)", _memory_rows(config, model, layout))
    if layers := moe_layers(model):
        _add(table, f"backends ({len(layers)} MoE layers)", _backend_rows(config, layers[0]))
    console.print(table)
    _warn_if_too_large(config, sum(estimate(config, model, layout)))
    if (reason := why_ranks_lose(config, model, strategy.data[1])) is not None:
        log.warning("%s", reason)


def _warn_if_too_large(config: TrainConfig, size: int) -> None:
    memory = device_memory(config.device)
    if memory is None and config.device.startswith("cuda"):
        log.warning(
            "the memory of %s is not known, because torch finds no GPU here; compare the sum of "
            "%s with that of your GPU, whose backends may differ, too",
            config.device,
            describe_bytes(size),
        )
    elif memory is not None and size > memory:
        log.warning(
            "a rank needs about %s and %s has %s; lower device_train_microbatch_size or the "
            "model, set activation_checkpointing: true, or shard it over more devices",
            describe_bytes(size),
            config.device,
            describe_bytes(memory),
        )


def maybe_fake_world(processes: int | None) -> AbstractContextManager[None]:
    """Context: act as rank 0 of `processes` ranks (None: the real ones).

    Raises ConfigError if tokenyard_parallel is not installed.
    """
    if processes is None:
        return nullcontext()
    parallel = require("tokenyard_parallel", "--nproc", "tokenyard[parallel]")
    context: AbstractContextManager[None] = parallel.fake_world(processes)
    return context


def _model_rows(config: TrainConfig, model: Model) -> Rows:
    size = count_parameters(model)
    forward = model.flops_per_token(config.max_seq_len)
    yield "name", config.model["name"]
    yield "parameters", f"{size.total:,}, of which {size.experts:,} in experts"
    yield "trainable", describe_trainable(model)
    yield "active parameters", f"{size.active:,} for each token"
    training = training_flops_per_token(model, config.max_seq_len)
    work = f"{describe_count(forward)} forward, {describe_count(training)} in training"
    yield "FLOPs per token", work
    yield "precision", f"{config.precision} on {config.device}"
    yield "deterministic", _deterministic(config)


def _deterministic(config: TrainConfig) -> str:
    gpu = config.device.startswith("cuda")
    if config.deterministic:
        return "yes: equal runs end bit-identical" + (f"; {COST}" if gpu else "")
    if gpu:
        return "no: gradients of embeddings and attention differ in the last bits"
    return "no; on a CPU, equal runs end bit-identical anyway"


def _data_rows(config: TrainConfig, data: Data, ranks: int) -> Rows:
    samples = config.global_train_batch_size
    tokens = samples * config.max_seq_len
    batches = run_batches(config, data)
    epochs = batches * samples / len(data.train)
    yield "tokenizer", describe_tokenizer(config, data).removeprefix("tokenizer ")
    yield "training text", data.train.describe()
    sets = data.held_out_sets()
    if not sets:
        yield "held-out text", "none"
    for kind, rows in sets.items():
        name = kind.replace("eval", "held-out text", 1).replace("/", " ", 1)
        yield name, f"{len(rows.predicted):,} tokens are scored"
    yield from table_versions(config).items()
    yield "batch", f"{tokens:,} tokens: {samples} samples over {_ranks(ranks)}"
    yield "forward pass", f"{config.device_train_microbatch_size} samples"
    total = describe_count(batches * tokens)
    yield "duration", f"{counted(batches, 'batch', 'batches')}, {epochs:.2f} epochs, {total} tokens"


def _layout_rows(config: TrainConfig, layout: ShardingReport) -> Rows:
    chosen = default_registry().choose("strategy", config.parallel.strategy)
    yield "strategy", describe_choice(chosen)
    for parameters, sizes in layout.meshes.items():
        mesh = " x ".join(f"{size} {dimension}" for dimension, size in sizes.items() if size > 1)
        yield parameters, mesh or "1 rank"


def _memory_rows(config: TrainConfig, model: Model, layout: ShardingReport) -> Rows:
    memory = estimate(config, model, layout)
    for name, value in memory._asdict().items():
        if value:
            yield name.replace("_", " "), describe_bytes(value)
    yield "sum", describe_bytes(sum(memory))
    if size := offloaded_bytes(config, model):
        yield "beside it, in host memory", describe_bytes(size)


def _backend_rows(config: TrainConfig, layer: MoE) -> Rows:
    for kind, chosen in layer.chosen.items():
        yield kind, describe_choice(chosen)
    width = COMPUTE_DTYPES[config.precision].itemsize
    yield from _kernel_rows(layer, width)
    yield from _exchange_rows(layer, width)


def _kernel_rows(moe: MoE, width: int) -> Rows:
    """Say what an expert kernel saves, if that is not x and the pre-activation, and advises."""
    rows = moe.workload.top_k
    saved = rows * saved_by_row(moe, width)
    usual = rows * width * moe.experts.up.shape[1]
    if saved != usual:
        yield "experts save", f"{saved:,} bytes a token and layer, {usual - saved:,} fewer"
    if size := weight_copies(moe):
        yield "experts keep", f"copies of a layer's weights, {describe_bytes(size)}"
    kernel: Any = moe.experts.kernel
    if moe.experts.adapter is not None or not hasattr(kernel, "advice"):
        return
    if (advice := kernel.advice(keeps_weight_copies(moe))) is not None:
        yield "experts could", advice


def _exchange_rows(moe: MoE, width: int) -> Rows:
    """Say what an exchange sends to other ranks, and what FP8 saves of it."""
    exchange: Any = moe.experts.exchange
    if not exchange.rows_per_token or not hasattr(exchange, "sent_bytes_per_token"):
        return
    sent = 2 * exchange.sent_bytes_per_token(width)
    to_others = exchange.rows_per_token * (1 - 1 / moe.workload.expert_parallel)
    fewer = round(2 * to_others * (width * moe.workload.dim - exchange.row_bytes(width)))
    saved = f", {fewer:,} fewer in FP8" if fewer else ""
    yield "exchange sends", f"{sent:,} bytes a token and layer, forward and backward{saved}"


def describe_choice(chosen: BackendChoice) -> str:
    """Return a backend's name, and why better ones were passed over."""
    passed_over = "; ".join(f"{name}: {reason}" for name, reason in chosen.passed_over.items())
    return chosen.backend.name + (f" (passed over {passed_over})" if passed_over else "")


def _add(table: Table, title: str, rows: Rows) -> None:
    table.add_row(f"[bold]{title}[/bold]", "")
    for name, value in rows:
        table.add_row(f"  {name}", escape(value))
    table.add_section()


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
