"""Read one version of a Delta table, by the deltalake library, which needs no JVM.

Rows are in the order of the data files' paths. Deletion vectors, partition columns and column
mapping by name are applied here, since the library reads such tables in no fixed order. Source:
https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from tokenyard import ConfigError
from tokenyard_train.data.paths import UNITY_CATALOG
from tokenyard_train.data.schema import RowSource, Source
from tokenyard_train.data.sources.keys import key_below
from tokenyard_train.data.sources.text import document_text, no_column
from tokenyard_train.data.sources.unity_catalog import Storage, resolve
from tokenyard_train.optional import require

_FEATURES = frozenset(
    (
        "columnMapping",
        "deletionVectors",
        "timestampNtz",
        "v2Checkpoint",
        "vacuumProtocolCheck",
    )
)
"""The reader features of the protocol that are respected."""

_PHYSICAL = "delta.columnMapping.physicalName"
_ANSI = re.compile(r"\x1b\[[0-9;]*m|↳")
_ROWS = 64  # that are converted at a time


class _File(NamedTuple):
    """A data file of one version."""

    path: str  # in the table
    bytes: int
    partition: dict[str, Any]  # column -> its value in all rows of the file
    kept: Any | None  # [rows] whether a row is not deleted, perhaps shorter; None: all are


class _Table(NamedTuple):
    """One version of a table."""

    name: str  # for errors: its key, location and version
    id: str
    columns: dict[str, Any]  # name -> the field of the schema
    files: list[_File]
    storage: Any  # its pyarrow filesystem


def delta_documents(source: Source, key: str) -> Iterator[bytes | None]:
    """Yield the documents of a table; None for a row whose text is null.

    Raises ConfigError if the table or version is unknown or unreadable, has no column `text_key`,
    or has a feature that is not supported.
    """
    table = _open(source, key)
    text_key = source.text_key
    if text_key not in table.columns:
        raise no_column(text_key, list(table.columns), table.name)
    for location, row in _rows(table, [text_key]):
        yield document_text(row[text_key], text_key, location)


def delta_rows(source: RowSource, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the location and the columns of each row of a table. Raises ConfigError."""
    table = _open(source, key)
    yield from _rows(table, list(table.columns))


def newest_version(source: Source | RowSource, key: str) -> int:
    """Return the newest version of a source's table. Raises ConfigError."""
    table, _ = _load(source, key, None)
    return int(table.version())


def describe_table(source: Source, key: str) -> dict[str, Any]:
    """Return the id of a source's table, and a digest of the files and deleted rows of its version.

    Raises ConfigError.
    """
    table = _open(source, key)
    digest = hashlib.sha256()
    for file in table.files:
        deleted = [] if file.kept is None else file.kept.to_pylist()
        digest.update(json.dumps([file.path, file.bytes, deleted]).encode())
    return {"table": table.id, "files": len(table.files), "sha256": digest.hexdigest()}


def _storage(location: str, key: str) -> Storage:
    """Return where a table is. Raises ConfigError if Unity Catalog does not give it."""
    if location.startswith(UNITY_CATALOG):
        return resolve(location, key_below(key, "delta"))
    return Storage(location, {})


def _load(source: Source | RowSource, key: str, version: int | None) -> tuple[Any, dict[str, str]]:
    """Open a version of a table, None for the newest; return it and the options of its storage.

    Raises ConfigError.
    """
    deltalake = require("deltalake", key_below(key, "delta"), "tokenyard-train[delta]")
    location = str(source.delta)
    storage = _storage(location, key)
    name = f"{key_below(key, 'delta')} {location!r}"
    try:
        table = deltalake.DeltaTable(storage.location, storage_options=storage.options)
    except deltalake.exceptions.TableNotFoundError:
        raise ConfigError(
            f"{name} is no Delta table; give a folder that holds a _delta_log"
        ) from None
    except Exception as error:  # errors come from deltalake and from each storage
        raise ConfigError(f"{name} cannot be opened: {_reason(error)}") from None
    newest = table.version()
    if version is None or version == newest:
        return table, storage.options
    if version > newest:
        raise ConfigError(
            f"{key_below(key, 'version')} is {version}, and the newest version of {location!r} is "
            f"{newest}; give an existing one"
        )
    try:
        table.load_as_version(version)
    except Exception as error:
        raise ConfigError(
            f"{key_below(key, 'version')} is {version}, which {location!r} no longer holds, "
            f"perhaps because its log was cleaned up: {_reason(error)}"
        ) from None
    return table, storage.options


def _open(source: Source | RowSource, key: str) -> _Table:
    loaded, options = _load(source, key, source.version)
    name = f"{key_below(key, 'delta')} {str(source.delta)!r} version {loaded.version()}"
    arrow = require("pyarrow", name, "tokenyard-train[delta]")
    _check_features(loaded, name)
    try:
        fields = json.loads(loaded.schema().to_json())["fields"]
        handler = require("deltalake.fs", name, "tokenyard-train[delta]").DeltaStorageHandler
        filesystem = require("pyarrow.fs", name, "tokenyard-train[delta]").PyFileSystem
        return _Table(
            name,
            loaded.metadata().id,
            {field["name"]: field for field in fields},
            _files(loaded, arrow),
            filesystem(handler(loaded.table_uri, options)),
        )
    except Exception as error:
        raise ConfigError(f"{name} cannot be opened: {_reason(error)}") from None


def _check_features(loaded: Any, name: str) -> None:
    """Raise ConfigError if a table cannot be read as its protocol demands."""
    protocol = loaded.protocol()
    unknown = sorted(set(protocol.reader_features or ()) - _FEATURES)
    if unknown or protocol.min_reader_version > 3:
        needs = unknown[0] if unknown else f"reader version {protocol.min_reader_version}"
        raise ConfigError(
            f"{name} needs the feature {needs} of Delta, which is not supported; copy the table "
            "into one without it"
        )
    mode = loaded.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mode not in ("none", "name"):
        raise ConfigError(
            f"{name} has delta.columnMapping.mode {mode!r}, which is not supported; only 'name' is"
        )


def _files(loaded: Any, arrow: Any) -> list[_File]:
    """Return the files of a version, sorted by path."""
    masks = arrow.table(loaded.deletion_vectors())
    kept = dict(zip(masks["filepath"].to_pylist(), masks["selection_vector"]))
    files = []
    for added in arrow.table(loaded.get_add_actions()).to_pylist():
        path = unquote(added["path"])  # the log holds paths as they are in URIs
        mask = kept.pop(loaded.table_uri + added["path"], None)
        values = None if mask is None else mask.values
        files.append(_File(path, added["size_bytes"], added.get("partition") or {}, values))
    if kept:
        raise ValueError(f"the deletion vector of {min(kept)} belongs to no file of the table")
    return sorted(files, key=lambda file: file.path)


def _rows(table: _Table, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and some columns of each row that is not deleted."""
    for file in table.files:
        try:
            for number, row in _rows_of_file(table, file, columns):
                yield f"{table.name} {file.path} row {number}", row
        except ConfigError:
            raise
        except FileNotFoundError:
            raise ConfigError(
                f"{table.name}: its file {file.path} is gone, perhaps deleted by VACUUM; give a "
                "newer version"
            ) from None
        except Exception as error:
            raise ConfigError(
                f"{table.name}: {file.path} cannot be read: {_reason(error)}"
            ) from None


def _rows_of_file(
    table: _Table, file: _File, columns: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number in the file, and the columns, of each row that is not deleted.

    A column that was added to the table after the file was written is null.
    """
    parquet = require("pyarrow.parquet", table.name, "tokenyard-train[delta]")
    stored = {name: _physical(table.columns[name]) for name in columns}
    with table.storage.open_input_file(file.path) as stream:
        content = parquet.ParquetFile(stream, page_checksum_verification=True)
        present = [name for name in stored.values() if name in content.schema_arrow.names]
        number = 0
        for batch in content.iter_batches(batch_size=_ROWS, columns=present):
            kept = _kept(file, number, batch.num_rows)
            for values, keep in zip(_python_rows(batch), kept):
                number += 1
                if keep:
                    row = {
                        name: _renamed(values.get(stored[name]), table.columns[name]["type"])
                        for name in columns
                    }
                    yield number, row | {k: v for k, v in file.partition.items() if k in row}


def _kept(file: _File, start: int, count: int) -> list[bool]:
    """Return which rows of a batch are not deleted. Rows past the end of the vector are kept."""
    if file.kept is None:
        return [True] * count
    mask: list[bool] = file.kept.slice(start, count).to_pylist()
    return mask + [True] * (count - len(mask))


def _python_rows(batch: Any) -> list[dict[str, Any]]:
    return batch.to_pylist() if batch.num_columns else [{} for _ in range(batch.num_rows)]


def _physical(field: dict[str, Any]) -> str:
    """Return the name of a field in the data files."""
    return str(field.get("metadata", {}).get(_PHYSICAL, field["name"]))


def _renamed(value: Any, kind: Any) -> Any:
    """Return a value of a data file with the names of the schema, at any depth."""
    if value is None or isinstance(kind, str):
        return value
    if kind["type"] == "struct":
        return {f["name"]: _renamed(value.get(_physical(f)), f["type"]) for f in kind["fields"]}
    if kind["type"] == "array":
        return [_renamed(item, kind["elementType"]) for item in value]
    return [(k, _renamed(item, kind["valueType"])) for k, item in value]


def _reason(error: Exception) -> str:
    text = " ".join(_ANSI.sub(" ", str(error)).split())
    return text.removeprefix("Kernel error: ")[:200] or type(error).__name__
