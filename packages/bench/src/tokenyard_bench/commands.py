"""The commands: check options, measure, print, and write files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from tokenyard import ConfigError, resolve_device
from tokenyard.errors import one_of
from tokenyard.measure.machine import describe_machine
from tokenyard_bench.case import DTYPES, ROUTINGS, RoutingKind
from tokenyard_bench.compare import compare
from tokenyard_bench.exchange import ExchangeSettings, bench_exchange, check_ranks, join_ranks
from tokenyard_bench.held import check_held, held_times
from tokenyard_bench.kernels import bench_kernels
from tokenyard_bench.launch_times import launch_times
from tokenyard_bench.layer import Measurement, bench_layer
from tokenyard_bench.options import (
    CaseOptions,
    ExchangeOptions,
    KernelsOptions,
    LayerOptions,
    RoutingOptions,
)
from tokenyard_bench.plot import efficiency_bars
from tokenyard_bench.routing import bench_routing
from tokenyard_bench.shapes import parse_shapes
from tokenyard_bench.sweep import Sweep
from tokenyard_bench.tables.changes import print_changes
from tokenyard_bench.tables.exchange import print_exchanges
from tokenyard_bench.tables.kernels import print_kernels
from tokenyard_bench.tables.layer import print_layers
from tokenyard_bench.tables.routing import print_routing
from tokenyard_cli.console import print_line
from tokenyard_cli.results import Record, check_folder, read_results, write_results

log = logging.getLogger("tokenyard")


def run_layer(options: LayerOptions, console: Console) -> None:
    """Measure layers. Print tables; write ``layer.json`` and ``layer.png``. Raises ConfigError."""
    sweep = _sweep(options, options.activation)
    if options.launches and sweep.device.type != "cuda":
        device = sweep.device.type
        raise ConfigError(f"--launches is for a GPU, and --device is {device!r}; leave it out")
    more: dict[str, Measurement] = {}
    if options.held:
        check_held(options.held, sweep.device)
        step = f"timing while {options.held} multiprocessors are held"
        more[step] = partial(held_times, multiprocessors=options.held)
    if options.launches:  # last: a failed capture can make the GPU unusable
        more["timing launches"] = launch_times
    cases = bench_layer(sweep, options.backends, options.peers, console, more, options.microbatches)
    path, content = _write("layer", options, sweep, cases, lambda r: print_layers(r, console))
    picture = path.with_suffix(".png")
    efficiency_bars(content["records"], content["machine"], picture)
    print_line(console, f"wrote {path} and {picture}")


def run_kernels(options: KernelsOptions, console: Console) -> None:
    """Measure pieces. Print tables; write ``kernels.json``. Raises ConfigError."""
    sweep = _sweep(options, options.activation)
    cases = bench_kernels(sweep, options.backends, console)
    path, _ = _write("kernels", options, sweep, cases, lambda r: print_kernels(r, console))
    print_line(console, f"wrote {path}")


def run_routing(options: RoutingOptions, console: Console) -> None:
    """Measure routers and permutations. Print tables; write ``routing.json``.

    Raises ConfigError.
    """
    sweep = _sweep(options)
    cases = bench_routing(sweep, options.backends, console)
    path, _ = _write("routing", options, sweep, cases, lambda r: print_routing(r, console))
    print_line(console, f"wrote {path}")


def run_exchange(options: ExchangeOptions, console: Console) -> None:
    """Measure exchanges on all ranks. On rank 0, print tables and write ``exchange.json``.

    Raises ConfigError.
    """
    if ":" in options.device:
        raise ConfigError(
            f"--device is {options.device!r}, the same for every rank; give cuda, cpu or auto"
        )
    one_device = _sweep(options, options.activation)
    world = join_ranks(one_device.device, options.timeout)
    check_ranks(one_device.shapes, world.size)
    sweep = replace(one_device, ranks=world.size)
    settings = ExchangeSettings(options.exchanges, options.experts, options.peers, options.pause)
    if world.rank > 0:
        for _ in bench_exchange(sweep, world, settings, Console(quiet=True)):
            pass
        return
    cases = bench_exchange(sweep, world, settings, console)
    path, _ = _write("exchange", options, sweep, cases, lambda r: print_exchanges(r, console))
    print_line(console, f"wrote {path}")


def run_compare(before: Path, after: Path, console: Console) -> None:
    """Print the changes between two files. Raises ConfigError."""
    changes, unmatched = compare(read_results(before), read_results(after))
    print_changes(changes, unmatched, console)


def _sweep(options: CaseOptions, activation: str = "swiglu") -> Sweep:
    """Check the options, and prepare the device. Raises ConfigError."""
    device = resolve_device(options.device, "--device")
    if device.type == "cuda":
        # CUDA events and synchronisation act on the current device.
        torch.cuda.set_device(device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        _warn_of_load()
    for dtype in options.dtypes:
        one_of("--dtype", dtype, DTYPES)
    for routing in options.routings:
        one_of("--routing", routing, ROUTINGS)
    return Sweep(
        parse_shapes(options.shapes, device.type == "cuda", options.tokens),
        options.dtypes,
        cast(list[RoutingKind], options.routings),
        device,
        activation,
        options.repetitions,
        options.seed,
    )


def _warn_of_load() -> None:
    """Log a warning if other work slows down a measurement on the CPU."""
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    if load > cores:
        log.warning(
            "the load of this machine is %.1f on %d cores: times are too long, and the order of "
            "backends may change; measure when it is idle",
            load,
            cores,
        )


def _write(
    kind: str,
    options: CaseOptions,
    sweep: Sweep,
    cases: Iterator[list[Record]],
    print_case: Callable[[list[Record]], None],
) -> tuple[Path, dict[str, Any]]:
    """Write and print the records of each case when it is measured; return file and content.

    An interrupted benchmark so keeps the cases before.
    """
    content: dict[str, Any] = {
        "kind": kind,
        "machine": describe_machine(sweep.device),
        "records": [],
    }
    path = options.out / f"{kind}.json"
    check_folder(options.out)
    for records in cases:
        content["records"] += records
        path = write_results(options.out, kind, content)
        print_case(records)
    return path, content
