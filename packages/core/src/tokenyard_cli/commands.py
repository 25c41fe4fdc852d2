"""Find the subcommands of `tokenyard` by the entry points of the group `tokenyard.commands`.

An entry point's name is the words on the command line, joined by dots. Its value is a typer app,
which becomes a group of commands, or a function, which becomes one command. So
``bench = "tokenyard_bench.cli:app"`` is `tokenyard bench`, and ``bench.train`` of another
distribution adds `tokenyard bench train` to it. A command is imported only to run or list it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from tokenyard_cli.exit import MISTAKE

GROUP = "tokenyard.commands"
EXTRAS = "tokenyard.extras"


@dataclass
class Node:
    """A word of the command line: the entry points for it, and those for the words below it."""

    path: str = ""  # the words up to this one, joined by dots
    points: list[EntryPoint] = field(default_factory=list)
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The words as on the command line."""
        return self.path.replace(".", " ")

    @property
    def word(self) -> str:
        """The last of the words."""
        return self.path.rpartition(".")[2]


class CommandGroup(TyperGroup):
    """A group of commands to which distributions add further ones."""

    node: Node

    @classmethod
    def extend(cls, group: TyperGroup, node: Node) -> CommandGroup:
        """Return a copy of a group with the commands below a node."""
        extended = cls.__new__(cls)
        vars(extended).update(vars(group))
        extended.node = node
        return extended

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands: the group's own, then those of entry points, sorted."""
        return list(dict.fromkeys((*super().list_commands(ctx), *sorted(self.node.children))))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name, or None."""
        if cmd_name in self.node.children:
            return load_command(self.node.children[cmd_name])
        command = super().get_command(ctx, cmd_name)
        return _missing_command(self.node, cmd_name) if command is None else command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of the first word. An unknown word is an error with a suggestion."""
        names = self.list_commands(ctx)
        close = get_close_matches(args[0], names, n=1)
        if close and args[0] not in names and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)


class InstalledCommands(CommandGroup):
    """The group of `tokenyard` itself: all installed commands."""

    @cached_property
    def node(self) -> Node:  # type: ignore[override]
        """All entry points, read when they are needed first."""
        return command_tree(entry_points(group=GROUP))


def command_tree(points: Iterable[EntryPoint]) -> Node:
    """Return the root of a tree in which each word of the entry points' names is a node."""
    root = Node()
    for point in points:
        node = root
        for word in point.name.split("."):
            path = f"{node.path}.{word}" if node.path else word
            node = node.children.setdefault(word, Node(path))
        node.points.append(point)
    return root


def command_distributions() -> list[Distribution]:
    """Return the distributions that provide commands, sorted by name."""
    owners = [point.dist for point in entry_points(group=GROUP)]
    unique = {owner.name: owner for owner in owners if owner is not None}
    return [unique[name] for name in sorted(unique)]


def load_command(node: Node) -> Any:
    """Import the command of a node. If that fails, return a command that says why."""
    parent = typer.Typer(add_completion=False)
    try:
        _add_command(parent, node)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken plugin, which may exit, costs only its command
        return _failing_command(
            node.word, f"`tokenyard {node.words}` cannot be imported: {_describe(error)}"
        )
    command = typer.main.get_group(parent).commands[node.word]
    return CommandGroup.extend(command, node) if isinstance(command, TyperGroup) else command


def _add_command(parent: typer.Typer, node: Node) -> None:
    """Import what a node's entry point names, and add it to a typer app."""
    if len(node.points) > 1:
        owners = " and ".join(sorted(point.dist.name for point in node.points if point.dist))
        raise ImportError(f"{owners} both provide it; uninstall one of them")
    if not node.points:
        names = ", ".join(sorted(node.children))
        group = typer.Typer(no_args_is_help=True, help=f"Run a subcommand: {names}.")
        parent.add_typer(group, name=node.word)
        return
    value = node.points[0].load()
    if isinstance(value, typer.Typer):
        parent.add_typer(value, name=node.word)
    else:
        parent.command(node.word)(value)


def _describe(error: BaseException) -> str:
    return str(error) if type(error) is ImportError else f"{type(error).__name__}: {error}"


def _missing_command(node: Node, word: str) -> Any:
    """Return a command that names the extra which provides a missing command; None without one.

    ``command.bench = bench`` says that ``tokenyard[bench]`` provides `tokenyard bench` and, if that
    has no entry point, every other word below it.
    """
    words = [*node.path.split("."), word] if node.path else [word]
    extras = {point.name: point.value for point in entry_points(group=EXTRAS)}
    shortest = len(words) if node.points else 1
    for length in range(len(words), shortest - 1, -1):
        extra = extras.get(".".join(("command", *words[:length])))
        if extra is not None:
            reason = (
                f"`tokenyard {' '.join(words)}` is not installed; "
                f'pip install "tokenyard[{extra}]" provides it'
            )
            return _failing_command(word, reason)
    return None


def _failing_command(word: str, reason: str) -> Any:
    """Return a command that takes any arguments, prints an error and exits with MISTAKE."""
    app = typer.Typer(add_completion=False)
    any_arguments = {"ignore_unknown_options": True, "allow_extra_args": True}

    @app.command(word, help=reason, add_help_option=False, context_settings=any_arguments)
    def fail(context: typer.Context) -> None:
        sys.stderr.write(f"error: {reason}\n")
        raise typer.Exit(MISTAKE)

    return typer.main.get_command(app)
