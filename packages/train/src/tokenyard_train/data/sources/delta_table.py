"""Open one version of a Delta table, by the deltalake library, which needs no JVM.

Source: https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NamedTuple
from urllib.parse import unquote

from tokenyard import ConfigError
from tokenyard_train.data.paths import DELTA_LOG, UNITY_CATALOG, is_table_name
from tokenyard_train.data.schema import RowSource, Source
from tokenyard_train.data.sources.keys import key_below
from tokenyard_train.data.sources.unity_catalog import Storage, resolve
from tokenyard_train.hide_secrets import hide_secrets
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

_VARIABLES = {
    "s3": "AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "s3a": "AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_ACCOUNT_KEY",
    "abfss": "AZURE_STORAGE_ACCOUNT_KEY",
}
"""Variables of the environment from which deltalake takes the credentials, by scheme."""

_REASON = 120  # characters of the start and of the end of another library's error
_ANSI = re.compile(r"\x1b\[[0-9;]*m|↳")

_ELSEWHERE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]+:/")  # the start of an absolute path
_STACK = re.compile(r" 0: (<unknown>|\S+::).*")  # the calls of a Rust library
_ANSWER = re.compile("<Code>(.*?)</Code>.*?<Message>(.*?)</Message>")  # of a cloud's storage


class File(NamedTuple):
    """A data file of one version."""

    path: str  # in the table
    bytes: int
    partition: dict[str, Any]  # column -> its value in all rows of the file
    kept: Any | None  # [rows] whether a row is not deleted, perhaps shorter; None: all are


class Table(NamedTuple):
    """One version of a table."""

    name: str  # for errors: its key, location and version
    id: str
    columns: dict[str, Any]  # name -> the field of the schema
    files: list[File]
    storage: Any  # its pyarrow filesystem


def newest_version(source: Source | RowSource, key: str) -> int:
    """Return the newest version of a source's table. Raises ConfigError."""
    table, _ = _load(source, key, None)
    return int(table.version())


def describe_table(source: Source, key: str) -> dict[str, Any]:
    """Return the id of a source's table, and a digest of the files and deleted rows of its version.

    Raises ConfigError.
    """
    table = open_table(source, key)
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
        raise _no_table(name, location, storage.location) from None
    except Exception as error:  # errors come from deltalake and from each storage
        if "catalog-managed" in str(error):
            raise _unsupported(name, "the feature catalogManaged") from None
        variables = _VARIABLES.get(location.partition("://")[0])
        hint = f"; its credentials come from the environment: {variables}" if variables else ""
        raise ConfigError(f"{name} cannot be opened: {reason_of(error)}{hint}") from None
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
            f"perhaps because its log was cleaned up: {reason_of(error)}"
        ) from None
    return table, storage.options


def _no_table(name: str, location: str, storage: str) -> ConfigError:
    """Return the error of a location without a table, which `storage` is to the catalog."""
    if storage != location:
        return ConfigError(
            f"{name} is in {storage}, as the catalog says, and this machine finds no Delta table "
            "there; mount that storage here, or ask the owner of the table"
        )
    hint = f", or {UNITY_CATALOG}{location} for Unity Catalog" if is_table_name(location) else ""
    return ConfigError(f"{name} is no Delta table; give a folder that holds a {DELTA_LOG}{hint}")


def open_table(source: Source | RowSource, key: str) -> Table:
    """Return the version of a table that a source names. Raises ConfigError."""
    loaded, options = _load(source, key, source.version)
    name = f"{key_below(key, 'delta')} {str(source.delta)!r} version {loaded.version()}"
    arrow = require("pyarrow", name, "tokenyard-train[delta]")
    _check_features(loaded, name)
    try:
        fields = json.loads(loaded.schema().to_json())["fields"]
        handler = require("deltalake.fs", name, "tokenyard-train[delta]").DeltaStorageHandler
        filesystem = require("pyarrow.fs", name, "tokenyard-train[delta]").PyFileSystem
        return Table(
            name,
            loaded.metadata().id,
            {field["name"]: field for field in fields},
            _files(loaded, arrow, name),
            filesystem(handler(loaded.table_uri, options)),
        )
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} cannot be opened: {reason_of(error)}") from None


def _check_features(loaded: Any, name: str) -> None:
    """Raise ConfigError if a table cannot be read as its protocol demands."""
    protocol = loaded.protocol()
    unknown = sorted(set(protocol.reader_features or ()) - _FEATURES)
    if unknown or protocol.min_reader_version > 3:
        needs = (
            f"the feature {unknown[0]}"
            if unknown
            else f"reader version {protocol.min_reader_version}"
        )
        raise _unsupported(name, needs)
    mode = loaded.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mode not in ("none", "name"):
        raise ConfigError(
            f"{name} has delta.columnMapping.mode {mode!r}, which is not supported; only 'name' is"
        )


def _unsupported(name: str, needs: str) -> ConfigError:
    return ConfigError(
        f"{name} needs {needs} of Delta, which is not supported; copy the table into one without it"
    )


def _files(loaded: Any, arrow: Any, name: str) -> list[File]:
    """Return the files of a version, sorted by path. Raises ConfigError for those elsewhere."""
    masks = arrow.table(loaded.deletion_vectors())
    kept = dict(zip(masks["filepath"].to_pylist(), masks["selection_vector"]))
    files = []
    for added in arrow.table(loaded.get_add_actions()).to_pylist():
        path = unquote(added["path"])  # the log holds paths as they are in URIs
        if _ELSEWHERE.match(path):
            raise ConfigError(
                f"{name} has files outside of its folder, as a shallow clone has: {path}; give "
                "the table that it was cloned from, or a deep clone"
            )
        mask = kept.pop(loaded.table_uri + added["path"], None)
        values = None if mask is None else mask.values
        files.append(File(path, added["size_bytes"], added.get("partition") or {}, values))
    if kept:
        raise ValueError(f"the deletion vector of {min(kept)} belongs to no file of the table")
    return sorted(files, key=lambda file: file.path)


def reason_of(error: Exception) -> str:
    """Return why another library failed, in one line: the start and the end, where the cause is."""
    text = " ".join(_ANSI.sub(" ", str(error)).split()).removeprefix("Kernel error: ")
    text = _STACK.sub("", text)
    answer = _ANSWER.search(text)
    text = hide_secrets(": ".join(answer.groups()) if answer else text)
    if len(text) > 2 * _REASON:
        text = f"{text[:_REASON]} ... {text[-_REASON:]}"
    return text or type(error).__name__
