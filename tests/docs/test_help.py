"""Each command's help has an example that parses, and the page that explains the command."""

import re
import shlex

import pytest
import typer
from blocks import ROOT
from test_blocks import check_options
from typer.core import TyperGroup

from tokenyard_cli import app


def installed(command, words=()):
    """Yield the words and the command of each group and command."""
    yield pytest.param(words, command, id=" ".join(("tokenyard", *words)))
    if isinstance(command, TyperGroup):
        for name in command.list_commands(None):
            yield from installed(command.get_command(None, name), (*words, name))


@pytest.mark.parametrize(("words", "command"), list(installed(typer.main.get_command(app))))
def test_help_has_an_example_and_a_page(words, command):
    (example,) = re.findall(r"^Example: (.*)$", command.help, re.MULTILINE)
    (page,) = re.findall(r"^Guide: (.*)$", command.help, re.MULTILINE)
    assert (ROOT / page).is_file()
    for part in re.split(r" && | > ", example):
        given = shlex.split(part)
        while "=" in given[0]:  # an environment variable
            given = given[1:]
        if given[0] == "tokenyard":
            check_options(given[1:])
    typed = example.replace("-m tokenyard_bench", "tokenyard bench")  # under torchrun
    assert f"tokenyard {' '.join(words)}".strip() in typed
