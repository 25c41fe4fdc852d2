"""`tokenyard bench`: measuring by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenyard_cli.console import wide_console

app = typer.Typer(name="bench", no_args_is_help=True, help="Measure layers and their pieces.")

Shapes = Annotated[
    list[str], typer.Option("--shape", help="A built-in name, T,D,F,E,K, or all; may be repeated.")
]
Dtypes = Annotated[list[str], typer.Option("--dtype", help="bf16, fp16 or fp32; may be repeated.")]
Routings = Annotated[
    list[str], typer.Option("--routing", help="natural, zipf or uniform; may be repeated.")
]
Backends = Annotated[str, typer.Option(help="Expert backends, comma-separated, or all.")]
Peers = Annotated[str, typer.Option(help="Peers, comma-separated, all or none.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Repetitions = Annotated[int, typer.Option(min=3)]
Threads = Annotated[int | None, typer.Option(min=1, help="Of a CPU; torch decides otherwise.")]
Out = Annotated[Path, typer.Option(help="The folder for JSON and plot.")]


@app.command()
def layer(
    shape: Shapes = ["all"],  # noqa: B006 (typer copies it)
    backends: Backends = "all",
    peers: Peers = "all",
    dtype: Dtypes = ["bf16"],  # noqa: B006
    routing: Routings = ["natural"],  # noqa: B006
    activation: str = "swiglu",
    device: Device = "auto",
    repetitions: Repetitions = 20,
    threads: Threads = None,
    seed: int = 0,
    out: Out = Path("bench"),
) -> None:
    """Measure an MoE layer (router included), forward and backward, by every backend, beside dense products and peers.

    Efficiency is the time of the layer's six products as dense ones over all T*K rows, divided by the layer's time.
    """
    from tokenyard_bench.commands import run_layer

    run_layer(
        wide_console(),
        out,
        shape,
        dtype,
        routing,
        device,
        threads,
        backends,
        peers,
        activation,
        repetitions,
        seed,
    )


@app.command()
def kernels(
    shape: Shapes = ["all"],  # noqa: B006
    backends: Backends = "all",
    dtype: Dtypes = ["bf16"],  # noqa: B006
    routing: Routings = ["natural"],  # noqa: B006
    activation: str = "swiglu",
    device: Device = "auto",
    repetitions: Repetitions = 20,
    threads: Threads = None,
    seed: int = 0,
    out: Out = Path("bench"),
) -> None:
    """Time a layer's pieces beside the best each could take, and list each backend's kernels and the gaps between."""
    from tokenyard_bench.commands import run_kernels

    run_kernels(
        wide_console(),
        out,
        shape,
        dtype,
        routing,
        device,
        threads,
        backends,
        "none",
        activation,
        repetitions,
        seed,
    )


@app.command()
def routing(
    shape: Shapes = ["all"],  # noqa: B006
    backends: Annotated[
        str, typer.Option(help="Permutations and routers, comma-separated, or all.")
    ] = "all",
    dtype: Dtypes = ["bf16"],  # noqa: B006
    routing: Routings = ["natural"],  # noqa: B006
    device: Device = "auto",
    repetitions: Repetitions = 20,
    threads: Threads = None,
    seed: int = 0,
    out: Out = Path("bench"),
) -> None:
    """Time routers, plans and moves of rows, forward and backward, by every backend, beside copies of as many bytes."""
    from tokenyard_bench.commands import run_routing

    run_routing(
        wide_console(),
        out,
        shape,
        dtype,
        routing,
        device,
        threads,
        backends,
        "none",
        "swiglu",
        repetitions,
        seed,
    )


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A JSON that tokenyard bench wrote.")],
    after: Annotated[Path, typer.Argument(help="A later one of the same kind.")],
) -> None:
    """Show what changed between two benchmark files beyond their noise."""
    from tokenyard_bench.commands import run_compare

    run_compare(wide_console(), before, after)
