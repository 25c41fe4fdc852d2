"""Choose one backend, or raise an error that says why none fits."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokenyard.backend import KINDS, Backend, Kind
from tokenyard.errors import BackendError, ConfigError, TokenyardError, did_you_mean
from tokenyard.foreign import attempt
from tokenyard.registry._discover import Problem
from tokenyard.registry._extras import hint, provided_by_extras
from tokenyard.registry._implementation import load_class
from tokenyard.registry._offers import Offer
from tokenyard.workload import Workload

Request = str | Mapping[str, Any] | None

_OTHER_VARIABLES = ("TOKENYARD_CACHE", "TOKENYARD_NOTES", "TOKENYARD_PARENT", "TOKENYARD_PIN")
"""Variables of this project that name no backend."""

_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))
"""What a GPU that is not here may have: those of Ampere, Hopper and both of Blackwell."""

log = logging.getLogger("tokenyard")


@dataclass(frozen=True)
class BackendChoice:
    """The backend chosen for a part, its options, and why better backends are unusable."""

    kind: Kind
    backend: Backend
    options: Mapping[str, Any] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)  # name of a better one -> reason

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        """Construct the backend. Raises BackendError if its constructor rejects the options."""
        cls = load_class(self.kind, self.backend)
        try:
            return cls(*args, **kwargs, **self.options)
        except TokenyardError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            if not self.options:
                raise
            names = ", ".join(self.options)
            raise BackendError(
                f"{self.kind} backend {self.backend.name!r} refused the options {names}: {error}"
            ) from error


def parse_request(kind: Kind, request: Request) -> tuple[str, dict[str, Any]]:
    """Return (name, options) of a request. ``$TOKENYARD_<KIND>`` overrides the name.

    An overridden request loses its options, which belong to another backend. Raises ConfigError if
    the name is not a string.
    """
    if isinstance(request, Mapping):
        options = dict(request)
        name = options.pop("name", "auto")
    else:
        options = {}
        name = request or "auto"
    if not isinstance(name, str):
        raise ConfigError(
            f"backends.{kind} is {request!r}; give a name, or a mapping with `name` and options"
        )
    override = overridden(kind)
    return (override, {}) if override and override != name else (name, options)


def variable(kind: Kind) -> str:
    """Return the environment variable that overrides the backend of a kind."""
    return f"TOKENYARD_{kind.upper()}"


def overridden(kind: Kind) -> str | None:
    """Return the backend name set in the environment, or None."""
    _warn_of_unknown_variables()
    return os.environ.get(variable(kind))


@functools.cache
def _warn_of_unknown_variables() -> None:
    """Log a warning, once, for each variable TOKENYARD_... that nothing reads."""
    known = [*map(variable, KINDS), *_OTHER_VARIABLES]
    for name in sorted(os.environ):
        if name.startswith("TOKENYARD_") and name not in known:
            log.warning(
                "the environment variable %s is not known and has no effect%s",
                name,
                did_you_mean(name, known),
            )


def choose(
    kind: Kind,
    name: str,
    options: Mapping[str, Any],
    offers: Sequence[Offer],
    problems: Sequence[Problem],
    workload: Workload | None,
) -> BackendChoice:
    """Choose the offer called `name`; "auto" chooses the first usable one. `offers`: best first.

    A named one may need a GPU of some compute capability, and none be here to tell: it is planned.
    """
    if name == "auto":
        return _auto(kind, options, offers, problems, workload)
    offer = next((o for o in offers if o.backend.name == name), None)
    if offer is None:
        raise BackendError(_unknown(kind, name, offers, problems))
    reason = _why_not_on_any_gpu(offer, workload)
    if reason is not None:
        usable = [o.backend.name for o in offers if why_not(o, workload) is None]
        instead = f"usable here: {', '.join(usable)}" if usable else "no other is usable here"
        raise BackendError(f"{kind} backend {name!r} is unusable here: {reason}; {instead}")
    return BackendChoice(kind, offer.backend, options)


def _auto(
    kind: Kind,
    options: Mapping[str, Any],
    offers: Sequence[Offer],
    problems: Sequence[Problem],
    workload: Workload | None,
) -> BackendChoice:
    passed_over: dict[str, str] = {}
    for offer in offers:
        reason = why_not(offer, workload) or load_fault(offer)
        if reason is None:
            _log_once(kind, offer.backend.name, tuple(passed_over.items()))
            return BackendChoice(kind, offer.backend, options, passed_over)
        if not _is_for_another(offer, workload):
            passed_over[offer.backend.name] = reason
    reasons = [f"{name}: {reason}" for name, reason in passed_over.items()]
    reasons += [problem.reason for problem in problems]
    missing = [name for name in provided_by_extras(kind) if name not in passed_over]
    raise BackendError(
        f"no {kind} backend is usable here ({'; '.join(reasons) or 'none is installed'})"
        + hint(kind, missing)
    )


def check_algorithm(name: str, offers: Sequence[Offer]) -> None:
    """Raise BackendError if no router may compute the routing algorithm `name`."""
    known = [offer.backend.algorithm for offer in offers]
    if None in known or name in known:
        return  # None: the router's own check decides
    installed = sorted({algorithm for algorithm in known if algorithm is not None})
    raise BackendError(
        f"routing algorithm {name!r} is unknown{did_you_mean(name, installed)}; "
        f"installed: {', '.join(installed) or 'none'}"
    )


def why_not(offer: Offer, workload: Workload | None) -> str | None:
    """Return why a backend is unusable for the workload; None if usable or without a workload."""
    if workload is None:
        return None
    if _is_for_another(offer, workload):
        return (
            f"{offer.backend.name!r} computes the routing algorithm "
            f"{offer.backend.algorithm!r}, not {workload.router.algorithm!r}"
        )
    if offer.kind == "experts" and workload.ffn_dims is not None and not offer.backend.any_width:
        return f"{offer.backend.name!r} computes experts of one width; leave out ffn_dims"
    reason, fault = attempt(lambda: _reason(offer.backend.unusable(workload)))
    return reason if fault is None else f"its own check failed: {fault}"


def _why_not_on_any_gpu(offer: Offer, workload: Workload | None) -> str | None:
    """Return why a backend is unusable, on all GPUs if the workload is for one that is not here."""
    reason = why_not(offer, workload)
    if reason is None or workload is None:
        return reason
    if workload.device.type != "cuda" or workload.capability is not None:
        return reason
    newest_first = sorted(_CAPABILITIES, reverse=True)
    reasons = [why_not(offer, replace(workload, capability=each)) for each in newest_first]
    if None in reasons:
        return None
    return next((other for other in reasons if other != reason), reason)


def _is_for_another(offer: Offer, workload: Workload | None) -> bool:
    """Return whether a router computes another routing algorithm: it is not a candidate."""
    if workload is None or offer.kind != "router":
        return False
    return offer.backend.algorithm not in (None, workload.router.algorithm)


def _reason(answer: object) -> str | None:
    return None if answer is None else " ".join(str(answer).split()) or "it gives no reason"


def load_fault(offer: Offer) -> str | None:
    """Import the class of a backend; return why that fails, else None."""
    try:
        load_class(offer.kind, offer.backend)
    except BackendError as error:
        return str(error)
    return None


def _unknown(kind: Kind, name: str, offers: Sequence[Offer], problems: Sequence[Problem]) -> str:
    names = [offer.backend.name for offer in offers]
    return (
        f"{kind} backend {name!r} is unknown{did_you_mean(name, names)}; "
        f"installed: {', '.join(names) or 'none'}"
        + hint(kind, [name])
        + "".join(f"; {problem.reason}" for problem in problems)
    )


@functools.cache
def _log_once(kind: Kind, name: str, passed_over: tuple[tuple[str, str], ...]) -> None:
    reasons = "".join(f"; not {other}: {reason}" for other, reason in passed_over)
    log.info("%s backend: auto took %r%s", kind, name, reasons)
