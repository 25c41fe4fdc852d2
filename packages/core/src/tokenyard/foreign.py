"""Call code of plugins, which may raise anything, and whose objects may have no text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_LONGEST = 200  # characters


def attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return (result, None) of a call, or (None, the exception as text) if it raises anything.

    Raises KeyboardInterrupt only.
    """
    try:
        return call(), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, shown(error)


def shown(value: object) -> str:
    """Return the repr of an object in one line of bounded length; its type if that fails."""
    try:
        text = " ".join(repr(value).split())
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"a {type(value).__name__} without a text"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
