"""Parse JSON that other tools may have written."""

from __future__ import annotations

import codecs
import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text in UTF-8. Raises ValueError, also for too deep nesting."""
    if isinstance(text, bytes):
        text = text.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
