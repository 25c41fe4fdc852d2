"""Read the rows of one version of a Delta table.

Rows are in the order of the data files' paths. Deletion vectors, partition columns and column
mapping by name are applied here, since the deltalake library reads such tables in no fixed order.
Source: https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.data.schema import RowSource, Source
from tokenyard_train.data.sources.delta_table import File, Table, open_table, reason_of
from tokenyard_train.data.sources.text import document_text, no_column
from tokenyard_train.optional import require

_PHYSICAL = "delta.columnMapping.physicalName"
_ROWS = 64  # that are converted at a time


def delta_documents(source: Source, key: str) -> Iterator[bytes | None]:
    """Yield the documents of a table; None for a row whose text is null.

    Raises ConfigError if the table or version is unknown or unreadable, has no column `text_key`,
    or has a feature that is not supported.
    """
    table = open_table(source, key)
    text_key = source.text_key
    if text_key not in table.columns:
        raise no_column(text_key, list(table.columns), table.name)
    for location, row in _rows(table, [text_key]):
        yield document_text(row[text_key], text_key, location)


def delta_rows(source: RowSource, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the location and the columns of each row of a table. Raises ConfigError."""
    table = open_table(source, key)
    yield from _rows(table, list(table.columns))


def _rows(table: Table, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
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
                f"{table.name}: {file.path} cannot be read: {reason_of(error)}"
            ) from None


def _rows_of_file(
    table: Table, file: File, columns: list[str]
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


def _kept(file: File, start: int, count: int) -> list[bool]:
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
