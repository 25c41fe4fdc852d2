"""Lines for log files, and the first line on a terminal."""

import os

import pytest
from rich.console import Console

from tokenyard_cli.console import print_line, print_starting


def test_a_line_is_neither_broken_nor_read_as_markup(capsys):
    text = "[bold]a/very/long/path[/bold] " * 10
    print_line(Console(width=20), text, "dim")
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize(
    ("terminal", "rank", "printed"),
    [(True, "0", "starting ...\n"), (True, "1", ""), (False, "0", "")],
)
def test_a_terminal_learns_that_the_program_starts(monkeypatch, capsys, terminal, rank, printed):
    monkeypatch.setitem(os.environ, "RANK", rank)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    print_starting()
    assert capsys.readouterr().out == printed
