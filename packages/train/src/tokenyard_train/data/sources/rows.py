"""Read rows with several columns: JSON, parquet, Delta tables, datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenyard_train.data.schema import RowSource
from tokenyard_train.data.sources.files import find_files
from tokenyard_train.data.sources.formats import read_file_rows
from tokenyard_train.data.sources.keys import key_below

Rows = Iterator[tuple[str, Any]]
"""The location of each row, for errors, and the row."""


def read_rows(source: RowSource, key: str) -> Rows:
    """Yield the rows of a source in a fixed order. Raises ConfigError."""
    if source.hf_name is not None:
        from tokenyard_train.data.sources.hugging_face import dataset_rows

        yield from dataset_rows(source, key)
        return
    if source.delta is not None:
        from tokenyard_train.data.sources.delta import delta_rows

        yield from delta_rows(source, key)
        return
    for file in find_files(source.path or [], source.suffixes, key_below(key, "path")):
        yield from read_file_rows(file, key_below(key, "path"))
