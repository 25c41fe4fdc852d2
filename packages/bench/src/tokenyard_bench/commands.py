"""What the subcommands of `tokenyard bench` do: check the options, measure, print, and write the files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokenyard import ConfigError, resolve_device
from tokenyard.errors import did_you_mean
from tokenyard.measure.machine import describe_machine
from tokenyard_bench.case import DTYPES, ROUTINGS
from tokenyard_bench.compare import compare, print_changes
from tokenyard_bench.kernels import bench_kernels, print_kernels
from tokenyard_bench.layer import LayerBench, bench_layer
from tokenyard_bench.layer_table import print_layers
from tokenyard_bench.plot import efficiency_bars
from tokenyard_bench.routing import bench_routing, print_routing
from tokenyard_bench.shapes import parse_shapes
from tokenyard_cli.results import read_results, write_results


def run_layer(console: Console, out: Path, *options: Any) -> None:
    """Measure layers; print the table and write ``layer.json`` and ``layer.png``. Raises ConfigError."""
    bench = _layer_bench(*options)
    machine = describe_machine(bench.device)
    records: list[dict[str, Any]] = []
    for found in bench_layer(bench, console):
        records += (
            found  # written case by case, so that hours of measuring are not lost to the last one
        )
        path = write_results(
            out, "layer", {"kind": "layer", "machine": machine, "records": records}
        )
        print_layers(found, console)
    efficiency_bars(records, machine, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}", highlight=False)


def run_kernels(console: Console, out: Path, *options: Any) -> None:
    """Measure the pieces of layers; print the breakdown and write ``kernels.json``. Raises ConfigError."""
    bench = _layer_bench(*options)
    records = bench_kernels(bench, console)
    print_kernels(records, console)
    content = {"kind": "kernels", "machine": describe_machine(bench.device), "records": records}
    console.print(f"wrote {write_results(out, 'kernels', content)}", highlight=False)


def run_routing(console: Console, out: Path, *options: Any) -> None:
    """Measure routers and permutations; print the table and write ``routing.json``. Raises ConfigError."""
    bench = _layer_bench(*options)
    machine = describe_machine(bench.device)
    records: list[dict[str, Any]] = []
    for found in bench_routing(bench, console):
        records += found
        path = write_results(
            out, "routing", {"kind": "routing", "machine": machine, "records": records}
        )
        print_routing(found, console)
    console.print(f"wrote {path}", highlight=False)


def run_compare(console: Console, before: Path, after: Path) -> None:
    """Print what changed between two files. Raises ConfigError."""
    print_changes(*compare(read_results(before), read_results(after)), console)


def _layer_bench(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    routings: Sequence[str],
    device: str,
    threads: int | None,
    *rest: Any,
) -> LayerBench:
    place = find_device(device, threads)
    one_of("--dtype", dtypes, DTYPES)
    one_of("--routing", routings, ROUTINGS)
    sizes = parse_shapes(list(shapes), place.type == "cuda")
    return LayerBench(sizes, list(routings), list(dtypes), place, *rest)  # type: ignore[arg-type]


def find_device(name: str, threads: int | None = None) -> torch.device:
    """Return the device that an option names, and set a CPU's threads. Raises ConfigError."""
    device = resolve_device(name, "--device")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and synchronisation are the current device's
    if threads is not None:
        torch.set_num_threads(threads)
    return device


def one_of(option: str, given: Sequence[str], known: Collection[str]) -> None:
    """Raise ConfigError for a value that an option does not take."""
    for value in given:
        if value not in known:
            raise ConfigError(
                f"{option} {value!r} is unknown{did_you_mean(value, known)}; known are: {', '.join(known)}"
            )
