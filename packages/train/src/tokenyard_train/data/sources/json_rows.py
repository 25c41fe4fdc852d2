"""Read the rows of a JSON file: one row per line, or an array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.data.json_text import explain, parse_json
from tokenyard_train.data.sources.compression import Stream
from tokenyard_train.data.sources.text import MAX_DOCUMENT_BYTES, check_size

_BLANK = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 20  # bytes of a JSON array that are read at a time, at least


def json_rows(stream: Stream, file: Path, decoder: json.JSONDecoder) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of each row. Raises ConfigError for a malformed row."""
    start = stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if start[:1] == b"[":
        return _ArrayRows(stream, file, decoder).rows()
    return _line_rows(stream, file, decoder)


def _line_rows(stream: Stream, file: Path, decoder: json.JSONDecoder) -> Iterator[tuple[str, Any]]:
    lines = iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b"")
    for number, line in enumerate(lines, 1):
        location = f"{file} line {number}"
        check_size(len(line), location)
        if line.strip():
            try:
                row = parse_json(line, decoder)
            except ValueError as error:
                if number == 1 and line.lstrip().startswith(b"{") and _goes_on(stream, line):
                    raise ConfigError(
                        f"{file} has a row of JSON over several lines; write each row in one line "
                        "(jq -c), or all as an array"
                    ) from None
                hint = "" if number > 1 else "; a file of JSON holds a row a line, or an array"
                raise ConfigError(f"{location} is not JSON: {error}{hint}") from None
            yield location, row


def _goes_on(stream: Stream, line: bytes) -> bool:
    """Return whether a line is the start of a JSON object, of which more lines follow."""
    opened = line.strip()
    return opened.endswith((b"{", b",", b"[")) and bool(stream.peek(1))


class _ArrayRows:
    """Parses the rows of a JSON array one by one, in memory that follows the largest row."""

    def __init__(self, stream: Stream, file: Path, decoder: json.JSONDecoder):
        self._stream = stream
        self._file = file
        self._decoder = decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""  # read and not parsed yet, from position `_at` on
        self._at = 0

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Yield each row's location and value."""
        self._take("[")
        number = 0
        while self._next_character() != "]" or number:
            number += 1
            location = f"{self._file} row {number}"
            yield location, self._value(location)
            if self._take(",]") == "]":
                break
        else:
            self._take("]")
        if rest := self._next_character():
            raise ConfigError(f"{self._file} has {rest!r} after its array; remove it")

    def _value(self, location: str) -> Any:
        self._next_character()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except RecursionError:
                raise ConfigError(f"{location} is not JSON: it is nested too deep") from None
            except json.JSONDecodeError as error:
                if len(self._text) > MAX_DOCUMENT_BYTES:
                    raise ConfigError(
                        f"{location} is not JSON, or has more than {MAX_DOCUMENT_BYTES:,} bytes"
                    ) from None
                if not self._read_more():
                    raise ConfigError(f"{location} is not JSON: {error}") from None
            except ValueError as error:  # more text would not mend it
                raise ConfigError(f"{location} is not JSON: {explain(error)}") from None

    def _take(self, allowed: str) -> str:
        character = self._next_character()
        if not character:
            raise ConfigError(f"{self._file} is cut off: its array has no end")
        if character not in allowed:
            raise ConfigError(
                f"{self._file} is not JSON: it has {character!r} where {' or '.join(allowed)} "
                "must follow"
            )
        self._at += 1
        return character

    def _next_character(self) -> str:
        """Return the next character that is not blank, or nothing at the end of the file."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        piece = self._stream.read(max(_PIECE, len(self._text)))
        self._text = self._text[self._at :] + self._utf8.decode(piece, final=not piece)
        self._at = 0
        return bool(piece)
