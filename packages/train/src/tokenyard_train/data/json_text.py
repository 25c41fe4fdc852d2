"""Parse JSON that other tools may have written."""

from __future__ import annotations

import codecs
import json
import sys
from functools import partial
from typing import Any

from tokenyard.bounded import unique_keys

DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
"""Parses JSON. Raises ValueError, also for a key with two different values, or RecursionError."""


def row_decoder(text_key: str) -> json.JSONDecoder:
    """Return a decoder of data rows, in which only the text may not have two values."""
    return json.JSONDecoder(object_pairs_hook=partial(unique_keys, only=text_key))


def parse_json(text: str | bytes, decoder: json.JSONDecoder = DECODER) -> Any:
    """Return the value of a JSON text in UTF-8. Raises ValueError, also for too deep nesting."""
    if isinstance(text, bytes):
        text = text.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    try:
        return decoder.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(explain(error)) from None


def explain(error: ValueError) -> str:
    """Return what is wrong with a JSON text, without the library's advice for programmers."""
    if "int_max_str_digits" in str(error):
        return f"it has a number of more than {sys.get_int_max_str_digits():,} digits"
    return str(error)
