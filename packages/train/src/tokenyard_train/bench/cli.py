"""`tokenyard bench train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenyard_cli.console import wide_console
from tokenyard_train.cli.exit import exit_if_collective_fails

Threads = Annotated[int | None, typer.Option(min=1, help="Of a CPU; torch decides otherwise.")]
Out = Annotated[Path, typer.Option(help="The folder for JSON and plot.")]


@exit_if_collective_fails()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value in place of the config's")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="transformers-eager, -grouped_mm, both, -tokenyard, or none.")
    ] = "none",
    peer_dtype: Annotated[
        str, typer.Option(help="Of the peers' weights: fp32, as ours are, or bf16.")
    ] = "fp32",
    steps: Annotated[int, typer.Option(min=3)] = 20,
    threads: Threads = None,
    out: Out = Path("bench"),
) -> None:
    """Measure training as a config says: tokens/s, FLOP/s, memory, and the share of data, forward, backward, optimizer.

    Peers are transformers' Mixtral of the same size on the same batches, their steps taken in turn with ours.
    With weights in bf16 they train wholly in bf16; only so does their grouped_mm, which does not follow autocast, too.
    """
    from tokenyard_train.bench.commands import run_train

    run_train(wide_console(), out, config, overrides or [], peers, peer_dtype, steps, threads)
