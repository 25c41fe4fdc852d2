"""Find the extra of the distribution `tokenyard` that provides a missing backend.

`tokenyard` declares its extras as entry points of the group ``tokenyard.extras``. For example,
``experts.gluon = triton`` means that ``tokenyard[triton]`` provides the experts backend `gluon`.
These entry points are read, never loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import entry_points

GROUP = "tokenyard.extras"


@functools.cache
def provided_by_extras(kind: str) -> dict[str, str]:
    """Return backend name -> extra for one kind; empty if `tokenyard` itself is not installed."""
    names = {point.name: point.value for point in entry_points(group=GROUP)}
    prefix = f"{kind}."
    return {
        name.removeprefix(prefix): extra for name, extra in names.items() if name.startswith(prefix)
    }


def hint(kind: str, names: Sequence[str]) -> str:
    """Return the end of an error message: the extras that provide the backends `names`.

    Returns "" if no extra provides any of them.
    """
    by_extra: dict[str, list[str]] = {}
    for name, extra in provided_by_extras(kind).items():
        if name in names:
            by_extra.setdefault(extra, []).append(repr(name))
    return "".join(
        f'; pip install "tokenyard[{extra}]" provides {" and ".join(backends)}'
        for extra, backends in by_extra.items()
    )
