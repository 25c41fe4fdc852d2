"""`tokenyard data`: pack text into token files, and check packed folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokenyard_cli import dataclass_options
from tokenyard_cli.guide import guide, with_guide
from tokenyard_cli.interrupts import fatal_interrupts
from tokenyard_train.commands.options import PackOptions, SparkPackOptions

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    help=with_guide(
        "Pack text into token files, and check them.",
        "tokenyard data pack packed my-texts",
        "train.md",
    ),
)

Folder = Annotated[Path, typer.Argument(help="Packed folder.")]


@app.command()
@guide("tokenyard data pack packed my-texts --workers 8", "train.md")
@dataclass_options
def pack(options: PackOptions) -> None:
    """Pack text into token files. Resumes an interrupted run."""
    with fatal_interrupts():
        from tokenyard_train.commands.data import run_pack

    run_pack(Console(), options)


@app.command()
@guide("tokenyard data spark packed catalog.schema.texts --order id", "train.md")
@dataclass_options
def spark(options: SparkPackOptions) -> None:
    """Pack a table of Spark into token files. Its executors tokenize the rows."""
    with fatal_interrupts():
        from tokenyard_train.commands.spark import run_spark

    run_spark(Console(), options)


@app.command()
@guide("tokenyard data verify packed", "train.md")
def verify(folder: Folder) -> None:
    """Check every block of a packed folder."""
    from tokenyard_train.commands.data import run_verify

    run_verify(Console(), folder)


@app.command()
@guide("tokenyard data info packed", "train.md")
def info(folder: Folder) -> None:
    """Print the manifest of a packed folder."""
    from tokenyard_train.commands.data import run_info

    run_info(Console(), folder)
