"""`tokenyard bench`: the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenyard_bench.options import (
    ExchangeOptions,
    KernelsOptions,
    LayerOptions,
    RoutingOptions,
)
from tokenyard_cli.console import wide_console
from tokenyard_cli.guide import guide, with_guide
from tokenyard_cli.options import dataclass_options

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=with_guide(
        "Measure layers and their pieces, beside dense matmuls and other libraries.",
        "tokenyard bench layer --shape mixtral --peers grouped_mm",
        "bench.md",
    ),
)


@app.command()
@guide("tokenyard bench layer --shape mixtral --peers grouped_mm", "bench.md")
@dataclass_options
def layer(options: LayerOptions) -> None:
    """Measure an MoE layer by every backend, beside dense matmuls and peers.

    Times forward and backward, router included.
    Efficiency is the time of its six matmuls as dense ones (T*K rows) over the layer's time.
    """
    from tokenyard_bench.commands import run_layer

    run_layer(options, wide_console())


@app.command()
@guide("tokenyard bench kernels --shape mixtral --backends triton", "bench.md")
@dataclass_options
def kernels(options: KernelsOptions) -> None:
    """Time a layer's pieces beside lower bounds, and profile each backend.

    Lists each backend's kernels and the gaps between them.
    """
    from tokenyard_bench.commands import run_kernels

    run_kernels(options, wide_console())


@app.command()
@guide("tokenyard bench routing --shape qwen3-30b", "bench.md")
@dataclass_options
def routing(options: RoutingOptions) -> None:
    """Time routers and permutations of every backend, forward and backward.

    Compares each call with a copy of as many bytes.
    """
    from tokenyard_bench.commands import run_routing

    run_routing(options, wide_console())


@app.command()
@guide(
    "torchrun --nproc-per-node 2 -m tokenyard_bench exchange --shape qwen3-30b --tokens 8192",
    "bench.md",
)
@dataclass_options
def exchange(options: ExchangeOptions) -> None:
    """Time an expert-parallel layer over ranks by every exchange, router excluded.

    Run it under torchrun: torchrun --nproc-per-node 2 -m tokenyard_bench exchange --tokens 8192.
    Compares each exchange with dense matmuls and with Liger-Kernel's fused layer.
    """
    from tokenyard_bench.commands import run_exchange

    run_exchange(options, wide_console())


@app.command()
@guide("tokenyard bench compare before/layer.json after/layer.json", "bench.md")
def compare(
    before: Annotated[Path, typer.Argument(help="JSON file that tokenyard bench wrote.")],
    after: Annotated[Path, typer.Argument(help="Later file of the same command.")],
) -> None:
    """Show the changes between two benchmark files that exceed their noise."""
    from tokenyard_bench.commands import run_compare

    run_compare(before, after, wide_console())
