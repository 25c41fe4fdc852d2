"""The commands that read a training config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokenyard_cli import dataclass_options
from tokenyard_cli.console import RunConsole, print_starting, wide_console
from tokenyard_cli.guide import guide
from tokenyard_cli.interrupts import fatal_interrupts
from tokenyard_train.cli.exit import exit_if_collective_fails
from tokenyard_train.commands.options import InitOptions

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Override keys of the config, such as optimizer.lr=1e-3."
    ),
]


@guide("tokenyard init config.yaml --model qwen3_moe", "quickstart.md")
@dataclass_options
def init(options: InitOptions) -> None:
    """Write a commented config to start from."""
    from tokenyard_train.commands.init import init as run

    run(options, Console())


@guide("tokenyard train config.yaml optimizer.lr=1e-3 run_name=faster", "train.md")
@exit_if_collective_fails()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a model from a YAML config."""
    from tokenyard_train.parent_death import die_with_supervisor

    die_with_supervisor()
    print_starting()
    with fatal_interrupts():
        from tokenyard_train.commands.train import train as run
        from tokenyard_train.config import load_config
        from tokenyard_train.distributed import leave_group
        from tokenyard_train.engine.signals import Stopped

    try:
        run(load_config(config, overrides or []), RunConsole())
    except Stopped:  # all ranks stop at the same step, so all of them leave the group
        leave_group()
        raise
    leave_group()


@guide("tokenyard launch config.yaml --nproc 8 parallel.strategy=fsdp", "pretrain.md")
def launch(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[
        int, typer.Option(min=1, max=1024, help="Number of ranks on this machine.")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Maximum restarts after a failure.")
    ] = 3,
) -> None:
    """Train with several ranks, restarted from the last good checkpoint after a failure."""
    from tokenyard_train.launch.supervisor import launch as run

    raise typer.Exit(run(config, overrides or [], nproc, max_restarts))


@guide("tokenyard check config.yaml --nproc 8 parallel.strategy=fsdp", "pretrain.md")
@exit_if_collective_fails()
def check(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1, max=1 << 20, help="Plan for this many ranks. Needs none of their GPUs."
        ),
    ] = None,
) -> None:
    """Validate a config. Print the model's size, cost, layout, memory and backends."""
    from tokenyard_train.commands.check import check as run
    from tokenyard_train.commands.check import maybe_fake_world
    from tokenyard_train.config import load_config

    with maybe_fake_world(nproc):
        run(load_config(config, overrides or [], planned=True), wide_console())


@guide("tokenyard migrate mpt-1b.yaml > config.yaml", "migrating.md")
def migrate(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Number of ranks that the run will have.")
    ] = 8,
) -> None:
    """Print a config of LLM Foundry in the keys of tokenyard, with a comment for each change."""
    from tokenyard_train.config.migrate import migrated

    print(migrated(config, overrides or [], nproc), end="")
