"""Names and options of what is compared, as the command line has them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean


def parse_request(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a text such as ``gluon:precision=fp8:save=fp8``.

    A value is JSON, or else text. `option` is the option of the command, such as ``--backends``.
    Raises ConfigError for an option without a value.
    """
    name, *settings = text.split(":")
    return name, dict(_setting(option, text, setting) for setting in settings)


def _setting(option: str, text: str, setting: str) -> tuple[str, Any]:
    key, equals, value = setting.partition("=")
    if not equals:
        raise ConfigError(
            f"{option} {text!r} has the option {setting!r}, which has no value; give KEY=VALUE, "
            "as in gluon:precision=fp8 or all_to_all:chunks=2"
        )
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parse_names(option: str, names: str, default: list[str], installed: Iterable[str]) -> list[str]:
    """Split the value of an option at its commas; "all" means `default`.

    Raises ConfigError for a name that is not installed.
    """
    if names == "all":
        return default
    installed = list(installed)
    for name in names.split(","):
        if name not in installed:
            known = ", ".join(installed)
            raise ConfigError(
                f"{option} {name!r} is unknown{did_you_mean(name, installed)}; "
                f"installed: {known}, or all"
            )
    return names.split(",")


def parse_peers(names: str, known: Iterable[str]) -> list[str]:
    """Split the value of ``--peers`` at its commas; "all" means every known peer, "none" none.

    Raises ConfigError for an unknown name.
    """
    known = list(known)
    peers = {"all": known, "none": []}.get(names, names.split(","))
    for name in peers:
        if name not in known:
            raise ConfigError(
                f"--peers {name!r} is unknown{did_you_mean(name, known)}; "
                f"known are: {', '.join(known)}, all, none"
            )
    return peers
