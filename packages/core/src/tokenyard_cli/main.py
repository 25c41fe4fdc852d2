"""The `tokenyard` command. Installed distributions add its subcommands as entry points."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenyard_cli.commands import InstalledCommands, command_distributions
from tokenyard_cli.exit import run_and_exit
from tokenyard_cli.guide import guide

app = typer.Typer(
    name="tokenyard",
    cls=InstalledCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_versions(requested: bool) -> None:
    if requested:
        for distribution in command_distributions():
            print(f"{distribution.name} {distribution.version}")
        raise typer.Exit


@app.callback()
@guide("tokenyard init config.yaml && tokenyard train config.yaml", "quickstart.md")
def tokenyard(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the version of each distribution that provides commands.",
        ),
    ] = False,
) -> None:
    """Train Mixture-of-Experts models, and measure their kernels."""


def main() -> None:
    """Run the command. A user's mistake ends in one sentence on stderr and exit code 2."""
    run_and_exit(app)
