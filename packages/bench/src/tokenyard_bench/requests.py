"""Requests for backends with options, as the command line has them."""

from __future__ import annotations

import json
from typing import Any

from tokenyard import ConfigError


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
