"""The `tokenyard` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenyard_train.bench.cli import app as bench
from tokenyard_train.cli.data import app as data
from tokenyard_train.cli.exit import run_and_exit
from tokenyard_train.cli.models import app as models
from tokenyard_train.cli.train import app as train

app = typer.Typer(
    name="tokenyard", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.add_typer(train)
app.add_typer(bench)
app.add_typer(data)
app.add_typer(models)


def _version(asked: bool) -> None:
    if asked:
        from tokenyard_train import __version__

        print(f"tokenyard-train {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Dropless Mixture-of-Experts training."""


def main() -> None:
    """Run the command; a user's mistake ends in one sentence on stderr and exit code 2."""
    run_and_exit(app)
