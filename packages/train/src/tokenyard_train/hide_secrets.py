"""Hide secrets of the environment in the errors of other libraries."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

_NAMES = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|SAS)(_|$)")
_SHORTEST = 6  # characters of a secret: a shorter value is a part of usual words
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_SIGNED = re.compile(r"(?i)(?<=[?&])(sig|x-amz-[\w-]+|x-goog-[\w-]+)=[^&\s)\"']+")


def hide_secrets(text: str) -> str:
    """Return a text with ``***`` for secrets, for users in URLs, and for signatures of URLs.

    A secret is the value of a variable of the environment such as AWS_SECRET_ACCESS_KEY or
    UNITY_CATALOG_TOKEN, as it is or as a URL writes it. The signature is that of a temporary
    credential, which is in no variable.
    """
    values = {
        value
        for name, value in os.environ.items()
        if _NAMES.search(name.upper()) and len(value) >= _SHORTEST
    }
    values |= {quote(value, safe="") for value in values}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _SIGNED.sub(r"\1=***", _USER.sub("***@", text))
