"""The backends that installed distributions offer."""

from __future__ import annotations

from dataclasses import dataclass

from tokenyard.backend import Backend, Kind


@dataclass(frozen=True)
class Offer:
    """A backend and the distribution that offers it."""

    kind: Kind
    backend: Backend
    distribution: str
    version: str
