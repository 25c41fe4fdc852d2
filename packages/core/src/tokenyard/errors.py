"""The errors tokenyard raises for a user's mistake: one sentence that names what was given and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TokenyardError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(TokenyardError, ValueError):
    """A value, key or argument is wrong; the sentence names it and what would work."""


class BackendError(TokenyardError):
    """A backend is unknown, unusable here, broken or offered twice."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name nearest to `name`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
