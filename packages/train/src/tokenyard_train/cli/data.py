"""`tokenyard data`: pack text into token files, and check packed folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokenyard_cli import dataclass_options
from tokenyard_cli.interrupts import fatal_interrupts
from tokenyard_train.commands.options import PackOptions, SparkPackOptions

app = typer.Typer(
    name="data", no_args_is_help=True, help="Pack text into token files, and check them."
)

Folder = Annotated[Path, typer.Argument(help="Packed folder.")]


@app.command()
@dataclass_options
def pack(options: PackOptions) -> None:
    """Pack text into token files. Resumes an interrupted run."""
    with fatal_interrupts():
        from tokenyard_train.commands.data import run_pack

    run_pack(Console(), options)


@app.command()
@dataclass_options
def spark(options: SparkPackOptions) -> None:
    """Pack a table of Spark into token files. Its executors tokenize the rows."""
    with fatal_interrupts():
        from tokenyard_train.commands.spark import run_spark

    run_spark(Console(), options)


@app.command()
def verify(folder: Folder) -> None:
    """Check every block of a packed folder."""
    from tokenyard_train.commands.data import run_verify

    run_verify(Console(), folder)


@app.command()
def info(folder: Folder) -> None:
    """Print the manifest of a packed folder."""
    from tokenyard_train.commands.data import run_info

    run_info(Console(), folder)
