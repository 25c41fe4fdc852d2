"""Documents in files, by their suffix: a file of text is one; .jsonl and .parquet hold one in each row."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean
from tokenyard_train.optional import needs

_SAMPLED = 1 << 16  # bytes at either end of a file that tell it from another


def files_of(paths: str | Sequence[str], suffixes: Collection[str], key: str) -> list[Path]:
    """List files, and those of folders (at any depth) that have one of the suffixes, in the order of their names.

    Raises ConfigError for a path that is missing, or a folder without such files.
    """
    return [
        file
        for path in ([paths] if isinstance(paths, str) else paths)
        for file in _named(Path(path), suffixes, key)
    ]


def documents_of(file: Path, text_key: str, key: str) -> Iterator[bytes]:
    """Yield the documents of a file. Raises ConfigError, naming file and row, for one that cannot be read."""
    reader = next((read for suffix, read in _READERS.items() if file.name.endswith(suffix)), _text)
    try:
        yield from reader(file, text_key, key)
    except (OSError, EOFError) as error:
        raise ConfigError(
            f"{key}: {file} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def describe_file(file: Path) -> dict[str, Any]:
    """Return a file's name, size, and the digest of its beginning and end."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_SAMPLED))
        opened.seek(max(0, size - _SAMPLED))
        digest.update(opened.read(_SAMPLED))
    return {"file": file.as_posix(), "bytes": size, "ends": digest.hexdigest()}


def list_files(root: Path, suffixes: Collection[str], without: Collection[str] = ()) -> list[Path]:
    """List the files under a folder by name, not entering the folders called as in `without`."""
    found: list[Path] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in without]
        found += [Path(folder, name) for name in files if name.endswith(tuple(suffixes))]
    return sorted(path for path in found if path.is_file())


def _named(path: Path, suffixes: Collection[str], key: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(
            f"{key} {str(path)!r} does not exist; give a file of text or a folder of them"
        )
    files = list_files(path, suffixes)
    if not files:
        ends = ", ".join(suffixes) or "nothing"
        raise ConfigError(
            f"{key} {str(path)!r} is a folder without files that end in {ends}; see dataset.suffixes"
        )
    return files


def _text(file: Path, text_key: str, key: str) -> Iterator[bytes]:
    text = file.read_bytes()
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {file} is not UTF-8 text; convert it, or leave it out") from None
    yield text


def _jsonl(opened: Callable[[Path], Any]) -> Callable[[Path, str, str], Iterator[bytes]]:
    def read(file: Path, text_key: str, key: str) -> Iterator[bytes]:
        with opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(
                        _parsed(line, file, number, key), text_key, f"{file} line {number}", key
                    )

    return read


def _parsed(line: bytes, file: Path, number: int, key: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{key}: {file} line {number} is not JSON: {error}") from None


def _text_of(row: Any, text_key: str, place: str, key: str) -> bytes:
    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
        columns = list(row) if isinstance(row, dict) else []
        hint = did_you_mean(text_key, columns)
        has = ", ".join(map(str, columns)) or "no columns"
        raise ConfigError(
            f"{key}: {place} has no text under {text_key!r}{hint}; it has {has}; see text_key"
        )
    return row[text_key].encode("utf-8", errors="replace")


def _open_zst(file: Path) -> Any:
    zstandard = needs("zstandard", f"{file.name}", "tokenyard-train[data]")
    return io.BufferedReader(zstandard.open(file, "rb"))


def _parquet(file: Path, text_key: str, key: str) -> Iterator[bytes]:
    parquet = needs("pyarrow.parquet", f"{file.name}", "tokenyard-train[data]")
    try:
        table = parquet.ParquetFile(file)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ConfigError(
            f"{key}: {file} is no parquet file: {' '.join(str(error).split())}"
        ) from None
    columns = table.schema_arrow.names
    if text_key not in columns:
        hint = did_you_mean(text_key, columns)
        raise ConfigError(
            f"{key}: {file} has no column {text_key!r}{hint}; it has {', '.join(columns)}; see text_key"
        )
    for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
        for number, value in enumerate(batch.column(0).to_pylist()):
            yield (
                _text_of({text_key: value}, text_key, f"{file} row {number}", key)
                if value is not None
                else b""
            )


_READERS: dict[str, Callable[[Path, str, str], Iterator[bytes]]] = {
    ".jsonl": _jsonl(lambda file: file.open("rb")),
    ".jsonl.gz": _jsonl(gzip.GzipFile),
    ".jsonl.zst": _jsonl(_open_zst),
    ".parquet": _parquet,
}
