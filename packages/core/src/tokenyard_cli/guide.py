"""The end of each command's help: an example, and the page that explains the command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Command = TypeVar("Command", bound=Callable[..., Any])

PAGES = "docs/"
"""Where the pages are: a folder of the repository. The site has them under the same names."""


def guide(example: str, page: str) -> Callable[[Command], Command]:
    """Add an example and a page, such as ``train.md``, to the help of a command."""

    def add(command: Command) -> Command:
        command.__doc__ = with_guide(inspect.getdoc(command) or "", example, page)
        return command

    return add


def with_guide(text: str, example: str, page: str) -> str:
    """Return the help of a command or a group with an example and a page."""
    return f"{text}\n\nExample: {example}\n\nGuide: {PAGES}{page}"
