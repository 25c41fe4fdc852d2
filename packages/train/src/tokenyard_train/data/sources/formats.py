"""Read the documents of one file: a text file is one, JSON and parquet have one per row."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.data.json_text import DECODER, row_decoder
from tokenyard_train.data.sources.compression import DECOMPRESSORS, open_decompressed
from tokenyard_train.data.sources.json_rows import json_rows
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


def read_file(
    file: Path, text_key: str, key: str, text_suffixes: Collection[str] = ()
) -> Documents:
    """Yield a file's documents; None for a row whose text is null.

    Raises ConfigError, naming file and row, if it is unreadable or of no known format.
    `text_suffixes` are read as text in addition to the usual ones.
    """
    suffix, compression = _suffixes(file.name)
    reader = _READERS.get(suffix)
    with _one_error(file, key):
        if reader is None:
            _refuse_unless_text(file, suffix, text_suffixes)
            reader = _read_text
        yield from reader(file, compression, text_key)


def read_file_rows(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the location and the columns of each row of a JSON or parquet file.

    Raises ConfigError, naming file and row, if it is unreadable or of another format.
    """
    suffix, compression = _suffixes(file.name)
    with _one_error(file, key):
        if suffix in (".jsonl", ".json"):
            with open_decompressed(file, compression) as stream:
                for location, row in json_rows(stream, file, DECODER):
                    yield f"{key}: {location}", row
        elif suffix == ".parquet":
            for location, row in _parquet_rows(file, compression):
                yield f"{key}: {location}", row
        else:
            raise ConfigError(
                f"{file} has no rows; .jsonl, .json (each also .gz, .zst) and .parquet have"
            )


@contextmanager
def _one_error(file: Path, key: str) -> Iterator[None]:
    """Context: raise ConfigError, one sentence that begins with the key, for any error."""
    try:
        yield
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


def _read_text(file: Path, compression: str, text_key: str) -> Documents:
    with open_decompressed(file, compression) as stream:
        text = stream.read(MAX_DOCUMENT_BYTES + 1)
        check_size(len(text), str(file))
    text = checked_text(text, str(file))
    if _suffixes(file.name)[0] in _SNIFFED and _JSON_ROW.match(text):
        raise ConfigError(
            f"{file} holds rows of JSON, and its name says text; name it .jsonl, "
            "or .md to read it as text"
        )
    yield text


def _read_json(file: Path, compression: str, text_key: str) -> Documents:
    """Read an array of rows, or one row per line."""
    with open_decompressed(file, compression) as stream:
        for location, row in json_rows(stream, file, row_decoder(text_key)):
            yield row_text(row, text_key, location)


def _read_parquet(file: Path, compression: str, text_key: str) -> Documents:
    table = _open_parquet(file, compression)
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


def _parquet_rows(file: Path, compression: str) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in _open_parquet(file, compression).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            number += 1
            yield f"{file} row {number}", row


def _open_parquet(file: Path, compression: str) -> Any:
    if compression:
        raise ConfigError(f"{file} is a compressed parquet file; decompress it")
    parquet = require("pyarrow.parquet", file.name, "tokenyard-train[data]")
    try:
        return parquet.ParquetFile(file, page_checksum_verification=True)
    except ValueError as error:  # includes pyarrow's ArrowInvalid
        raise ConfigError(f"{file} is not a parquet file: {' '.join(str(error).split())}") from None


_READERS: dict[str, Callable[[Path, str, str], Documents]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
