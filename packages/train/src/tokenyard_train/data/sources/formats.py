"""Read the documents of one file: a text file is one, JSON and parquet have one per row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePath
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.data.json_text import explain, parse_json, row_decoder
from tokenyard_train.data.sources.compression import DECOMPRESSORS, Stream, open_decompressed
from tokenyard_train.data.sources.text import (
    MAX_DOCUMENT_BYTES,
    check_size,
    checked_text,
    document_text,
    no_column,
    row_text,
)
from tokenyard_train.optional import require

Documents = Iterator[bytes | None]
"""UTF-8 texts. None is a row whose text is null."""

_ALIASES = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".pq": ".parquet", ".zstd": ".zst"}
# fmt: off
_TEXT = frozenset((
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml",
    ".srt", ".log", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh",
    ".java", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".pl", ".sh", ".bash",
    ".sql", ".r", ".jl", ".scala", ".kt", ".swift", ".cs", ".fs", ".hs", ".ml", ".lua", ".el",
    ".clj", ".ex", ".exs", ".erl", ".m", ".f90", ".asm", ".s", ".css", ".scss", ".vue", ".proto",
    ".cmake", ".toml", ".ini", ".cfg", ".yaml", ".yml", ".diff", ".patch",
))  # prose, markup, code
# fmt: on
_TABLES = {".csv": "CSV", ".tsv": "TSV", ".xlsx": "Excel", ".arrow": "Arrow", ".feather": "Arrow"}
_SNIFFED = frozenset(("", ".txt", ".text"))  # suffixes that rows of JSON also have by mistake
_JSON_ROW = re.compile(rb'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')
_BLANK = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 20  # bytes of a JSON array that are read at a time, at least


def read_file(
    file: Path, text_key: str, key: str, text_suffixes: Collection[str] = ()
) -> Documents:
    """Yield a file's documents; None for a row whose text is null.

    Raises ConfigError, naming file and row, if it is unreadable or of no known format.
    `text_suffixes` are read as text in addition to the usual ones.
    """
    suffix, compression = _suffixes(file.name)
    reader = _READERS.get(suffix)
    try:
        if reader is None:
            _refuse_unless_text(file, suffix, text_suffixes)
            reader = _read_text
        yield from reader(file, compression, text_key)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except Exception as error:  # each decompressor and pyarrow have errors of their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(
            f"{key}: {file} cannot be read: {reason or type(error).__name__}"
        ) from None


def canonical_name(name: str) -> str:
    """Return a file's name in lower case, with one spelling for each format.

    A compressed .json is .jsonl: both are read as an array or as one row per line.
    """
    stem, compression = _split(name.lower())
    start, suffix = _split(stem)
    compression = _ALIASES.get(compression, compression)
    if compression in DECOMPRESSORS:
        suffix = ".jsonl" if suffix == ".json" else _ALIASES.get(suffix, suffix)
        return start + suffix + compression
    return stem + compression


def _split(name: str) -> tuple[str, str]:
    """Split a name before its last dot. A leading dot begins a suffix, too."""
    start, dot, suffix = name.rpartition(".")
    return (start, dot + suffix) if dot else (name, "")


def _suffixes(name: str) -> tuple[str, str]:
    """Return a name's canonical suffixes of the format and of the compression."""
    path = PurePath(canonical_name(PurePath(name).name))
    if path.suffix and path.suffix in DECOMPRESSORS:
        return PurePath(path.stem).suffix, path.suffix
    return path.suffix, ""


def _refuse_unless_text(file: Path, suffix: str, text_suffixes: Collection[str]) -> None:
    if suffix in _TABLES:
        raise ConfigError(
            f"{file} is a table ({_TABLES[suffix]}), which is not read; "
            "convert it to .jsonl or .parquet"
        )
    listed = {_suffixes(f"x{name}")[0] for name in text_suffixes}
    if suffix and suffix not in _TEXT | listed:
        raise ConfigError(
            f"{file} ends in {suffix!r}, which is not read; text (.txt, .md, code), .jsonl, .json "
            "(each also .gz, .zst) and .parquet are; rename it, or list it in dataset.suffixes "
            "if it is text"
        )


_NUL_SHARE = 4  # a text is refused if more than one byte in so many is NUL


def _read_text(file: Path, compression: str, text_key: str) -> Documents:
    with open_decompressed(file, compression) as stream:
        text = stream.read(MAX_DOCUMENT_BYTES + 1)
        check_size(len(text), str(file))
    text = checked_text(text, str(file))
    if text.count(0) * _NUL_SHARE > len(text):
        raise ConfigError(
            f"{file} has {text.count(0):,} NUL bytes, as UTF-16 without a byte order mark or a "
            "binary file has; convert it, or leave it out"
        )
    if _suffixes(file.name)[0] in _SNIFFED and _JSON_ROW.match(text):
        raise ConfigError(
            f"{file} holds rows of JSON, and its name says text; name it .jsonl, "
            "or .md to read it as text"
        )
    yield text


def _read_json(file: Path, compression: str, text_key: str) -> Documents:
    """Read an array of rows, or one row per line."""
    with open_decompressed(file, compression) as stream:
        start = stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
        decoder = row_decoder(text_key)
        rows = (
            _ArrayRows(stream, file, decoder).rows()
            if start[:1] == b"["
            else _line_rows(stream, file, decoder)
        )
        for location, row in rows:
            yield row_text(row, text_key, location)


def _line_rows(stream: Stream, file: Path, decoder: json.JSONDecoder) -> Iterator[tuple[str, Any]]:
    lines = iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b"")
    for number, line in enumerate(lines, 1):
        location = f"{file} line {number}"
        check_size(len(line), location)
        if line.strip():
            try:
                row = parse_json(line, decoder)
            except ValueError as error:
                hint = "" if number > 1 else "; a file of JSON holds a row a line, or an array"
                raise ConfigError(f"{location} is not JSON: {error}{hint}") from None
            yield location, row


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


def _read_parquet(file: Path, compression: str, text_key: str) -> Documents:
    if compression:
        raise ConfigError(f"{file} is a compressed parquet file; decompress it")
    parquet = require("pyarrow.parquet", file.name, "tokenyard-train[data]")
    try:
        table = parquet.ParquetFile(file, page_checksum_verification=True)
    except ValueError as error:  # includes pyarrow's ArrowInvalid
        raise ConfigError(f"{file} is not a parquet file: {' '.join(str(error).split())}") from None
    columns = table.schema_arrow.names
    if text_key not in columns:
        raise no_column(text_key, columns, str(file))
    if columns.count(text_key) > 1:
        raise ConfigError(f"{file} has {columns.count(text_key)} columns {text_key!r}; rename one")
    number = 0
    for batch in table.iter_batches(batch_size=64, columns=[text_key]):
        for value in batch.column(0):
            number += 1
            yield document_text(value.as_py(), text_key, f"{file} row {number}")


_READERS: dict[str, Callable[[Path, str, str], Documents]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
