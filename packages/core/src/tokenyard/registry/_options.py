"""Find options that the class of a backend does not have."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from tokenyard.backend import Backend, Kind
from tokenyard.errors import BackendError, did_you_mean
from tokenyard.registry._choose import BackendChoice
from tokenyard.registry._implementation import load_class
from tokenyard.registry._offers import Offer

_POSITIONAL: dict[Kind, int] = {"router": 1, "permutation": 1, "experts": 2, "exchange": 3}
"""How many arguments of a constructor come before its options. See ``BackendChoice.construct``."""


def check_options(chosen: BackendChoice, offers: Sequence[Offer]) -> None:
    """Raise BackendError for an option that the chosen backend does not have.

    The error names the backends among `offers` that have it.
    """
    if not chosen.options:
        return
    known = _options_of(chosen.kind, chosen.backend)
    unknown = [] if known is None else [name for name in chosen.options if name not in known]
    if not unknown:
        return
    option = unknown[0]
    name = chosen.backend.name
    others = [o.backend.name for o in offers if option in (_options_of(o.kind, o.backend) or ())]
    hint = f"name a backend that has it ({', '.join(others)}), or " if others else ""
    raise BackendError(
        f"{_key(chosen.kind)}.{option} is {chosen.options[option]!r}, and {name!r} has no such "
        f"option{did_you_mean(option, known or ())}; {hint}leave it out; "
        f"the options of {name!r}: {', '.join(known or ()) or 'none'}"
    )


def _key(kind: Kind) -> str:
    """Return the key of a config for the backends of a kind."""
    return "parallel.strategy" if kind == "strategy" else f"backends.{kind}"


def _options_of(kind: Kind, backend: Backend) -> list[str] | None:
    """Return the names of the options of a backend; None if it cannot be told."""
    try:
        parameters = list(inspect.signature(load_class(kind, backend)).parameters.values())
    except (BackendError, TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    named = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    options = positional[_POSITIONAL.get(kind, 0) :] + named
    # a strategy gets the device of the run
    return [name for name in options if kind != "strategy" or name != "device"]
