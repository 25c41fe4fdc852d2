"""The rules for the text of a document, equal in all sources."""

from __future__ import annotations

import codecs
from typing import Any

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean

MAX_DOCUMENT_BYTES = 128 << 20
"""The largest document, and the largest row that holds one. It bounds the memory of readers."""

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_NUL_SHARE = 4  # a text is refused if more than one byte in so many is NUL
_PIECE = 1 << 20  # bytes that are decoded at a time, to check them

_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    ((int, float), "a number"),
    (list, "a list"),
    (dict, "an object"),
)


def document_text(value: Any, text_key: str, location: str) -> bytes | None:
    """Return a row's value as UTF-8, or None for null.

    A value is a string, or bytes of UTF-8. Raises ConfigError, naming the location, for any other
    value. See `checked_text`.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{location}: {text_key!r} has a lone surrogate at character {error.start}, "
                "which is not text; repair it, or leave the row out"
            ) from None
    if not isinstance(value, bytes):
        kind = next((name for types, name in _KINDS if isinstance(value, types)), None)
        hint = " (render chats to text first)" if isinstance(value, list) else ""
        raise ConfigError(
            f"{location}: {text_key!r} holds {kind or type(value).__name__}; "
            f"text is a string{hint}; see text_key (data pack: --text-key)"
        )
    return checked_text(value, location)


def row_text(row: Any, text_key: str, location: str) -> bytes | None:
    """Return the text of a row, or None for null. Raises ConfigError if there is no such column."""
    if isinstance(row, dict) and text_key in row:
        return document_text(row[text_key], text_key, location)
    raise no_column(text_key, list(row) if isinstance(row, dict) else [], location)


def no_column(text_key: str, columns: list[str], location: str) -> ConfigError:
    """Return the error for rows without a column `text_key`."""
    hint = did_you_mean(text_key, columns)
    has = ", ".join(map(str, columns)) or "no columns"
    return ConfigError(
        f"{location} has no column {text_key!r}{hint}; it has {has}; see text_key "
        "(data pack: --text-key)"
    )


def checked_text(text: bytes, location: str) -> bytes:
    """Return UTF-8 text without the byte order mark at its start.

    Raises ConfigError if it is not UTF-8, larger than MAX_DOCUMENT_BYTES, or full of NUL bytes.
    """
    check_size(len(text), location)
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if text.startswith(mark):
            raise ConfigError(f"{location} is {encoding} text; convert it to UTF-8")
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(text), _PIECE):
            decoder.decode(text[start : start + _PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise ConfigError(f"{location} is not UTF-8 text; convert it, or leave it out") from None
    if text.count(0) * _NUL_SHARE > len(text):
        raise ConfigError(
            f"{location} has {text.count(0):,} NUL bytes, as UTF-16 without a byte order mark or "
            "binary data has; convert it, or leave it out"
        )
    return text.removeprefix(codecs.BOM_UTF8)


def check_size(size: int, location: str) -> None:
    """Raise ConfigError if a document, or the row that holds it, is too large."""
    if size > MAX_DOCUMENT_BYTES:
        raise ConfigError(
            f"{location} has more than {MAX_DOCUMENT_BYTES:,} bytes, which is the most that a "
            "document may have; split it, such as into rows of a .jsonl file"
        )
