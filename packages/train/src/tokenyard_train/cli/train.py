"""The commands for training from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokenyard_train.cli.exit import exit_if_collective_fails

app = typer.Typer()

Config = Annotated[Path, typer.Argument(help="A YAML config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value in place of the config's, such as optimizer.lr=1e-3"),
]


@app.command()
@exit_if_collective_fails()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a model from a YAML config."""
    from tokenyard_cli.console import RunConsole
    from tokenyard_train.commands.train import train as run
    from tokenyard_train.config import load_config
    from tokenyard_train.distributed import leave_group
    from tokenyard_train.engine.signals import Stopped

    try:
        run(load_config(config, overrides or []), RunConsole())
    except Stopped:  # as all processes are
        leave_group()
        raise
    leave_group()


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often a run that failed is taken up again.")
    ] = 3,
) -> None:
    """Train by several processes on this machine, and go on from the last good checkpoint when one of them fails."""
    from tokenyard_train.launch.supervisor import launch as run

    raise typer.Exit(run(config, overrides or [], nproc, max_restarts))


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes to lay it out over; they need not exist.")
    ] = None,
) -> None:
    """Validate a config; print the model's size, work, layout and memory, and the backends chosen."""
    from tokenyard_train.commands.check import check as run
    from tokenyard_train.commands.check import maybe_fake_world
    from tokenyard_train.config import load_config

    with maybe_fake_world(nproc):
        run(load_config(config, overrides or []), Console())
