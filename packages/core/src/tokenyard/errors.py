"""Errors that a user can cause. Each message is one sentence: what is wrong, what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class TokenyardError(Exception):
    """Base class of all errors that a user can cause and fix."""

    exit_code: ClassVar[int] = 2
    """Exit code of a command that this error ends."""


class ConfigError(TokenyardError, ValueError):
    """A value, key or argument is wrong. The message names it and says what would work."""


class BackendError(TokenyardError):
    """A backend is unknown, unusable on this machine, broken or offered twice."""


def one_of(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ConfigError unless `name` is one of `known`; `what` is the key or argument."""
    known = list(known)
    if name not in known:
        raise ConfigError(unknown(what, name, known))


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return ``<what> 'swigl' is unknown (did you mean 'swiglu'?); known are: swiglu, geglu``."""
    known = list(known)
    return f"{what} {name!r} is unknown{did_you_mean(name, known)}; known are: {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known name, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
