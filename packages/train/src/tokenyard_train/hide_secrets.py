"""Hide secrets of the environment in the errors of other libraries."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|SAS)(_|$)")
_SHORTEST = 6  # characters of a secret: a shorter value is a part of usual words
_USER = re.compile(r"(?<=://)[^/@\s]+@")


def hide_secrets(text: str) -> str:
    """Return a text with ``***`` for the secrets of the environment, and for users in URLs.

    A secret is the value of a variable such as AWS_SECRET_ACCESS_KEY or UNITY_CATALOG_TOKEN.
    """
    values = {
        value
        for name, value in os.environ.items()
        if _NAMES.search(name.upper()) and len(value) >= _SHORTEST
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER.sub("***@", text)
