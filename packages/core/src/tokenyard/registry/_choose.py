"""Choosing one backend, and the sentences that say why another was not."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenyard.backend import Backend, Kind
from tokenyard.errors import BackendError, ConfigError, did_you_mean
from tokenyard.registry._discover import Problem
from tokenyard.registry._extras import hint, provided_by_extras
from tokenyard.registry._offers import Offer
from tokenyard.workload import Workload

Request = str | Mapping[str, Any] | None

log = logging.getLogger("tokenyard")


@dataclass(frozen=True)
class Chosen:
    """A backend that was chosen, the options for its constructor, and why better ones were passed over."""

    kind: Kind
    backend: Backend
    options: Mapping[str, Any] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)  # name -> its sentence

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        """Construct the backend; raises BackendError naming the options if its constructor refuses them."""
        cls = self.backend.load()
        try:
            return cls(*args, **kwargs, **self.options)
        except TypeError as error:
            if not self.options:
                raise
            given = ", ".join(self.options)
            raise BackendError(
                f"{self.kind} backend {self.backend.name!r} refused the options {given}: {error}"
            ) from error


def parse_request(kind: Kind, request: Request) -> tuple[str, dict[str, Any]]:
    """Return (name, options) of a request, with the environment's ``TOKENYARD_<KIND>`` in place of a config's name."""
    if isinstance(request, Mapping):
        options = dict(request)
        name = options.pop("name", "auto")
    else:
        name, options = request or "auto", {}
    if not isinstance(name, str):
        raise ConfigError(
            f"backends.{kind} is {request!r}; give a name, or a mapping with `name` and options"
        )
    override = overridden(kind)
    return (override, {}) if override and override != name else (name, options)


def variable(kind: Kind) -> str:
    """Return the name of the environment's variable that goes before a config's backend of a kind."""
    return f"TOKENYARD_{kind.upper()}"


def overridden(kind: Kind) -> str | None:
    """Return the backend that the environment asks for, if it does."""
    return os.environ.get(variable(kind))


def choose(
    kind: Kind,
    name: str,
    options: Mapping[str, Any],
    offers: Sequence[Offer],
    problems: Sequence[Problem],
    workload: Workload | None,
) -> Chosen:
    """Pick the offer called `name`, or for "auto" the first usable of `offers` (which stand best first)."""
    if name == "auto":
        return _auto(kind, options, offers, problems, workload)
    offer = next((o for o in offers if o.backend.name == name), None)
    if offer is None:
        raise BackendError(_unknown(kind, name, offers, problems))
    reason = why_not(offer, workload)
    if reason is not None:
        usable = [o.backend.name for o in offers if why_not(o, workload) is None]
        instead = f"usable here: {', '.join(usable)}" if usable else "no other is usable here"
        raise BackendError(f"{kind} backend {name!r} is unusable here: {reason}; {instead}")
    return Chosen(kind, offer.backend, options)


def _auto(
    kind: Kind,
    options: Mapping[str, Any],
    offers: Sequence[Offer],
    problems: Sequence[Problem],
    workload: Workload | None,
) -> Chosen:
    passed_over: dict[str, str] = {}
    for offer in offers:
        reason = why_not(offer, workload)
        if reason is None:
            _say_once(kind, offer.backend.name, tuple(passed_over.items()))
            return Chosen(kind, offer.backend, options, passed_over)
        passed_over[offer.backend.name] = reason
    reasons = "; ".join(
        [f"{n}: {r}" for n, r in passed_over.items()] + [p.reason for p in problems]
    )
    sentence = f"no {kind} backend is usable here ({reasons or 'none is installed'})"
    raise BackendError(
        sentence
        + hint(kind, [name for name in provided_by_extras(kind) if name not in passed_over])
    )


def why_not(offer: Offer, workload: Workload | None) -> str | None:
    """Return the sentence of a backend that is unusable for the workload; None if it is usable, or none is given."""
    if workload is None:
        return None
    try:
        return offer.backend.unusable(workload)
    except Exception as error:
        return f"its own check failed: {error!r}"


def _unknown(kind: Kind, name: str, offers: Sequence[Offer], problems: Sequence[Problem]) -> str:
    names = [o.backend.name for o in offers]
    sentence = f"{kind} backend {name!r} is unknown{did_you_mean(name, names)}; installed: {', '.join(names) or 'none'}"
    sentence += hint(kind, [name])
    return sentence + "".join(f"; {p.reason}" for p in problems)


@functools.cache
def _say_once(kind: Kind, name: str, passed_over: tuple[tuple[str, str], ...]) -> None:
    reasons = "".join(f"; not {other}: {reason}" for other, reason in passed_over)
    log.info("%s backend: auto took %r%s", kind, name, reasons)
