"""The subcommands of `tokenyard`, found by entry points."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import typer
from typer.testing import CliRunner

from tokenyard_cli import commands
from tokenyard_cli.exit import MISTAKE

tools = typer.Typer(no_args_is_help=True, help="Use tools.")


@tools.command()
def saw() -> None:
    """Cut wood."""
    print("sawing")


@tools.command()
def drill() -> None:
    """Make holes."""


def hammer(blows: int = 1) -> None:
    """Drive nails."""
    print("bang " * blows)


@pytest.fixture
def invoke(monkeypatch):
    """Run `tokenyard` with entry points given as name=attribute; return (exit code, output)."""

    def run(arguments, extras=(), **values):
        groups = {
            commands.GROUP: [
                EntryPoint(name.replace("__", "."), f"{__name__}:{value}", commands.GROUP)
                for name, value in values.items()
            ],
            commands.EXTRAS: [EntryPoint(*pair, commands.EXTRAS) for pair in extras],
        }
        monkeypatch.setattr(commands, "entry_points", lambda group: groups[group])
        app = typer.Typer(cls=commands.InstalledCommands, no_args_is_help=True)
        app.callback()(lambda: None)
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.output

    return run


def test_a_function_is_a_command_and_an_app_is_a_group(invoke):
    points = {"hit": "hammer", "tools": "tools"}
    assert invoke(["hit", "--blows", "2"], **points) == (0, "bang bang \n")
    assert invoke(["tools", "saw"], **points) == (0, "sawing\n")


def test_help_lists_all_commands(invoke):
    code, out = invoke(["--help"], tools="tools", hit="hammer")
    assert code == 0
    assert out.index("Drive nails.") < out.index("Use tools.")


def test_a_dotted_name_adds_a_command_to_a_group(invoke):
    points = {"tools": "tools", "tools__hit": "hammer"}
    assert invoke(["tools", "hit"], **points) == (0, "bang \n")
    assert invoke(["tools", "saw"], **points) == (0, "sawing\n")
    _, out = invoke(["tools", "--help"], **points)
    for part in ("Use tools.", "Cut wood.", "Make holes.", "Drive nails."):
        assert part in out


def test_a_dotted_name_works_without_its_group(invoke):
    assert invoke(["tools", "hit"], tools__hit="hammer") == (0, "bang \n")
    code, out = invoke(["tools", "saw"], extras=[("command.tools", "wood")], tools__hit="hammer")
    assert (code, out) == (
        MISTAKE,
        "error: `tokenyard tools saw` is not installed; "
        'pip install "tokenyard[wood]" provides it\n',
    )


def test_a_missing_command_names_its_extra(invoke):
    extras = [("command.tools", "wood")]
    code, out = invoke(["tools", "saw", "--fast", "--help"], extras=extras)
    assert code == MISTAKE
    assert out.startswith("error: `tokenyard tools` is not installed; pip install ")
    assert "No such command" in invoke(["tolls"], extras=extras)[1]


def test_a_misspelt_command_gets_a_suggestion(invoke):
    assert "Did you mean 'hit'?" in invoke(["hitt"], hit="hammer")[1]
    points = {"tools": "tools", "tools__hit": "hammer"}
    assert "Did you mean 'hit'?" in invoke(["tools", "hitt"], **points)[1]
    assert "Did you mean" not in invoke(["zzz"], hit="hammer")[1]


def test_a_missing_command_of_an_installed_group_names_its_extra(invoke):
    extras = [("command.tools", "wood"), ("command.tools.hit", "iron")]
    assert 'pip install "tokenyard[iron]"' in invoke(["tools", "hit"], extras, tools="tools")[1]
    assert "No such command" in invoke(["tools", "hot"], extras, tools="tools")[1]


def test_a_broken_command_breaks_no_other(invoke):
    points = {"broken": "missing", "hit": "hammer"}
    assert invoke(["hit"], **points)[0] == 0
    assert "cannot be imported: AttributeError" in " ".join(invoke(["--help"], **points)[1].split())
    code, out = invoke(["broken", "--any"], **points)
    assert code == MISTAKE
    assert out.startswith("error: `tokenyard broken` cannot be imported: AttributeError: ")


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("bye"), GeneratorExit(), OSError(5)])
def test_a_command_that_raises_at_import_breaks_no_other(error, invoke, monkeypatch):
    def load(point):
        if point.value.endswith("missing"):
            raise error
        return hammer

    monkeypatch.setattr(EntryPoint, "load", load)
    points = {"broken": "missing", "hit": "hammer"}
    assert invoke(["hit"], **points)[0] == 0
    assert invoke(["--help"], **points)[0] == 0
    assert invoke(["broken"], **points)[0] == MISTAKE


def test_two_distributions_of_one_command_are_an_error(invoke, monkeypatch):
    points = [EntryPoint("hit", f"{__name__}:hammer", commands.GROUP) for _ in range(2)]
    for point, name in zip(points, ("acme", "tokenyard-x")):
        vars(point).update(dist=type("Dist", (), {"name": name}))
    node = commands.command_tree(points).children["hit"]
    parent = typer.Typer()
    with pytest.raises(ImportError, match="acme and tokenyard-x both provide it; uninstall one"):
        commands._add_command(parent, node)


def test_listing_the_installed_commands_does_not_import_torch():
    code = (
        "import sys\n"
        "sys.argv = ['tokenyard', '{}']\n"
        "from tokenyard_cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    for option, part in (("--help", "backends"), ("--version", "tokenyard-core ")):
        command = [sys.executable, "-c", code.format(option)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert part in done.stdout
