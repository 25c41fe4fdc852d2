"""The `tokenyard` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from tokenyard_train.bench.cli import app as bench
from tokenyard_train.data_cli import app as data
from tokenyard_train.models_cli import app as models

app = typer.Typer(name="tokenyard", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench)
app.add_typer(data)
app.add_typer(models)

Config = Annotated[Path, typer.Argument(help="A YAML config.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value in place of the config's, such as optimizer.lr=1e-3")
]


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a model from a YAML config."""
    from tokenyard_train.config import load_config
    from tokenyard_train.console import RunConsole
    from tokenyard_train.run import train as run
    from tokenyard_train.stopping import Stopped
    from tokenyard_train.together import part

    try:
        run(load_config(config, overrides or []), RunConsole())
    except Stopped:  # as all processes are
        part()
        raise
    part()


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    max_restarts: Annotated[int, typer.Option(min=0, help="How often a run that failed is taken up again.")] = 3,
) -> None:
    """Train by several processes on this machine, and go on from the last good checkpoint when one of them fails."""
    from tokenyard_train.launch import launch as run

    raise typer.Exit(run(config, overrides or [], nproc, max_restarts))


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to lay it out over; they need not exist.")] = None,
) -> None:
    """Validate a config; print the model's size, work, layout and memory, and the backends chosen."""
    from tokenyard_train.check import check as run
    from tokenyard_train.check import imagined
    from tokenyard_train.config import load_config

    with imagined(nproc):
        run(load_config(config, overrides or []), Console())


@app.command()
def backends() -> None:
    """List the installed backends, and why one cannot be used here."""
    from tokenyard.__main__ import main as table

    raise typer.Exit(table())


def _version(asked: bool) -> None:
    if asked:
        from tokenyard_train import __version__

        print(f"tokenyard-train {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Dropless Mixture-of-Experts training."""


def main() -> None:
    """Run the command; a user's mistake ends in one sentence on stderr and exit code 2."""
    try:
        _run()
    except SystemExit as ended:
        if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(ended.code, int | None):
            _leave(ended.code or 0)
        raise


def _leave(code: int) -> NoReturn:
    """End one of several processes without taking Python down, but for what `atexit` was given.

    A thread of gloo's may still hold the tensor of the last collective. Where it lets go of it after Python has begun
    to take itself down, it cannot have the interpreter's lock any more, and the whole process aborts.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        app()
    except Exception as error:
        from tokenyard.errors import TokenyardError  # loads torch, so not for --help

        if not isinstance(error, TokenyardError):
            _say_collective(error)
            raise
        from tokenyard_train.exit_codes import MISTAKE, STOPPED
        from tokenyard_train.stopping import Stopped

        if isinstance(error, Stopped):
            if _rank() == 0:  # all processes are, alike
                print(error, file=sys.stderr)
            sys.exit(STOPPED)
        sys.stderr.write(f"error: {error}\n")  # at once, since other processes may write, too
        sys.exit(MISTAKE)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say_collective(error: Exception) -> None:
    """End with a sentence, and code 1, if another process of the run is missed in a collective."""
    from tokenyard_train.notes import fault_of, note_fault

    fault, rank = fault_of(error), _rank()
    if fault is not None:
        note_fault(fault, rank)
        print(f"error: process {rank} failed in {fault.collective}: {fault.reason}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of other groups may wait for that process, too, and would not let this one go
