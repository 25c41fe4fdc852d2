from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from tokenyard_cli import dataclass_options


@dataclass(frozen=True)
class Common:
    seed: int = 0
    kinds: Annotated[list[str], typer.Option("--kind", help="Repeatable.")] = field(
        default_factory=lambda: ["all"]
    )


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    out: Annotated[Path, typer.Argument(help="Output folder.")]
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes.")] = None
    fused: Annotated[bool, typer.Option("--fused", help="One tensor.")] = False


@pytest.fixture
def invoke():
    """Run a command that takes Options; return the result and what the command received."""
    app = typer.Typer()
    received = []

    @app.command()
    @dataclass_options
    def pack(options: Options, context: typer.Context) -> None:
        """Pack text into token files."""
        received.append((options, context))

    return lambda *arguments: (CliRunner().invoke(app, arguments), received)


def test_fields_become_arguments_and_options(invoke):
    arguments = ("there", "--kind", "a", "--kind", "b", "--workers", "2", "--fused", "--seed", "3")
    result, received = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert received[0][0] == Options(
        out=Path("there"), workers=2, fused=True, seed=3, kinds=["a", "b"]
    )


def test_defaults_are_those_of_the_fields(invoke):
    _, received = invoke("there")
    assert received[0][0] == Options(out=Path("there"))


def test_other_parameters_stay(invoke):
    _, received = invoke("there")
    assert received[0][1].info_name == "pack"


def test_help_shows_every_field(invoke):
    result, _ = invoke("--help")
    for part in ("Pack text into token files.", "Output folder.", "--workers", "--kind", "--fused"):
        assert part in result.output
    assert "--options" not in result.output


def test_limits_are_checked(invoke):
    result, received = invoke("there", "--workers", "0")
    assert result.exit_code == 2
    assert not received


def test_a_command_without_dataclass_is_an_error():
    with pytest.raises(TypeError, match="takes no dataclass"):
        dataclass_options(lambda: None)


def test_two_parameters_of_one_name_are_an_error():
    def command(options: Options, seed: int) -> None: ...

    with pytest.raises(TypeError, match="two parameters named seed"):
        dataclass_options(command)
