"""`tokenyard backends`: the table of installed backends."""

from __future__ import annotations

import typer

from tokenyard_cli.guide import guide


@guide("TOKENYARD_EXPERTS=torch tokenyard backends", "backends.md")
def backends() -> None:
    """List the installed backends. Says why one is not usable on this machine."""
    from tokenyard.__main__ import main

    raise typer.Exit(main())
