"""Read documents from files: a text file is one, .jsonl and .parquet have one per row."""

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
from tokenyard_train.optional import require

_SAMPLED = 1 << 16  # bytes at each end of a file that its description hashes


def find_files(paths: str | Sequence[str], suffixes: Collection[str], key: str) -> list[Path]:
    """Return the given files, and the files in the given folders that have one of the suffixes.

    Folders are searched at any depth, and their files are sorted by path. Raises ConfigError for a
    missing path, or for a folder without such files.
    """
    return [
        file
        for path in ([paths] if isinstance(paths, str) else paths)
        for file in _expand(Path(path), suffixes, key)
    ]


def read_file(file: Path, text_key: str, key: str) -> Iterator[bytes]:
    """Yield a file's documents. Raises ConfigError, naming file and row, if it is unreadable."""
    reader = next(
        (reader for suffix, reader in _READERS.items() if file.name.endswith(suffix)), _read_text
    )
    try:
        yield from reader(file, text_key, key)
    except (OSError, EOFError) as error:
        raise ConfigError(
            f"{key}: {file} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def describe_file(file: Path) -> dict[str, Any]:
    """Return a file's name, size, and a digest of its first and last bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_SAMPLED))
        stream.seek(max(0, size - _SAMPLED))
        digest.update(stream.read(_SAMPLED))
    return {"file": file.as_posix(), "bytes": size, "ends": digest.hexdigest()}


def list_files(root: Path, suffixes: Collection[str], excluded: Collection[str] = ()) -> list[Path]:
    """List the files under a folder, sorted by path. Folders named in `excluded` are skipped."""
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded]  # prunes the walk
        paths += [Path(folder, name) for name in files if name.endswith(tuple(suffixes))]
    return sorted(path for path in paths if path.is_file())


def _expand(path: Path, suffixes: Collection[str], key: str) -> list[Path]:
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
            f"{key} {str(path)!r} is a folder without files that end in {ends}; "
            "see dataset.suffixes"
        )
    return files


def _read_text(file: Path, text_key: str, key: str) -> Iterator[bytes]:
    text = file.read_bytes()
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {file} is not UTF-8 text; convert it, or leave it out") from None
    yield text


def _jsonl_reader(open_file: Callable[[Path], Any]) -> Callable[[Path, str, str], Iterator[bytes]]:
    def read(file: Path, text_key: str, key: str) -> Iterator[bytes]:
        with open_file(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    location = f"{file} line {number}"
                    yield _row_text(_parse_json(line, location, key), text_key, location, key)

    return read


def _parse_json(line: bytes, location: str, key: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{key}: {location} is not JSON: {error}") from None


def _row_text(row: Any, text_key: str, location: str, key: str) -> bytes:
    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
        columns = list(row) if isinstance(row, dict) else []
        hint = did_you_mean(text_key, columns)
        has = ", ".join(map(str, columns)) or "no columns"
        raise ConfigError(
            f"{key}: {location} has no text under {text_key!r}{hint}; it has {has}; see text_key"
        )
    return row[text_key].encode("utf-8", errors="replace")


def _open_zst(file: Path) -> Any:
    zstandard = require("zstandard", f"{file.name}", "tokenyard-train[data]")
    return io.BufferedReader(zstandard.open(file, "rb"))


def _read_parquet(file: Path, text_key: str, key: str) -> Iterator[bytes]:
    parquet = require("pyarrow.parquet", f"{file.name}", "tokenyard-train[data]")
    try:
        table = parquet.ParquetFile(file)
    except ValueError as error:  # includes pyarrow's ArrowInvalid
        raise ConfigError(
            f"{key}: {file} is not a parquet file: {' '.join(str(error).split())}"
        ) from None
    columns = table.schema_arrow.names
    if text_key not in columns:
        hint = did_you_mean(text_key, columns)
        raise ConfigError(
            f"{key}: {file} has no column {text_key!r}{hint}; "
            f"it has {', '.join(columns)}; see text_key"
        )
    for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
        for number, value in enumerate(batch.column(0).to_pylist()):
            if value is None:
                yield b""
            else:
                yield _row_text({text_key: value}, text_key, f"{file} row {number}", key)


_READERS: dict[str, Callable[[Path, str, str], Iterator[bytes]]] = {
    ".jsonl": _jsonl_reader(lambda file: file.open("rb")),
    ".jsonl.gz": _jsonl_reader(gzip.GzipFile),
    ".jsonl.zst": _jsonl_reader(_open_zst),
    ".parquet": _read_parquet,
}
