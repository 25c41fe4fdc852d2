"""Read documents from a source. Each module reads one kind of location, in a fixed order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenyard_train.data.schema import RowSource, Source
from tokenyard_train.data.sources.files import (
    describe_file,
    find_files,
    list_files,
    repeated_files,
)
from tokenyard_train.data.sources.formats import read_file
from tokenyard_train.data.sources.keys import key_below

log = logging.getLogger("tokenyard")


def read_documents(source: Source, key: str) -> Iterator[bytes]:
    """Yield the non-empty documents of a source as UTF-8.

    Rows whose text is null are skipped, and a warning counts them. Raises ConfigError. `key` is
    the source's config key, for the error.
    """
    nulls = 0
    for document in _all_documents(source, key):
        nulls += document is None
        if document:
            yield document
    if nulls:
        log.warning("%s: %d rows have null under %r; skipped", key, nulls, source.text_key)


def _all_documents(source: Source, key: str) -> Iterator[bytes | None]:
    if source.hf_name is not None:
        from tokenyard_train.data.sources.hugging_face import dataset_documents

        yield from dataset_documents(source, key)
    elif source.local is not None:
        from tokenyard_train.data.sources.mds import mds_documents

        yield from mds_documents(mds_folder(source), source.text_key, key_below(key, "local"))
    elif source.delta is not None:
        from tokenyard_train.data.sources.delta import delta_documents

        yield from delta_documents(source, key)
    else:
        yield from _file_documents(source, key_below(key, "path"))


def _file_documents(source: Source, key: str) -> Iterator[bytes | None]:
    """Yield the documents of files. Warns of files that are read twice, and of those without rows.

    An empty file of text is as usual as an empty module of code.
    """
    files = find_files(source.path or [], source.suffixes, key)
    _warn_of(repeated_files(files), key, "read twice, as links or by several paths")
    empty = []
    for file in files:
        rows = 0
        for document in read_file(file, source.text_key, key, source.suffixes):
            rows += 1
            yield document
        if not rows:
            empty.append(file)
    _warn_of(empty, key, "without rows")


def _warn_of(files: list[Path], key: str, problem: str) -> None:
    if files:
        log.warning("%s: files %s: %d, such as %s", key, problem, len(files), files[0])


def newest_version(source: Source | RowSource, key: str) -> int:
    """Return the newest version of a source's Delta table. Raises ConfigError."""
    from tokenyard_train.data.sources import delta_table

    return delta_table.newest_version(source, key)


def mds_folder(source: Source) -> Path:
    """Return the folder of a source's MDS shards: `local`, or its subfolder `split`."""
    return Path(str(source.local), source.split or "")


def describe_source(source: Source, key: str) -> list[dict[str, Any]]:
    """Return a description of a source: its settings, and its files by their sizes and ends.

    A Delta table is described by its id and the digest of its version, a dataset on the hub by its
    settings alone. Raises ConfigError.
    """
    if source.path is not None:
        files = find_files(source.path, source.suffixes, key_below(key, "path"))
    elif source.local is not None:
        from tokenyard_train.data.sources.mds_index import index_files

        files = index_files(mds_folder(source), key_below(key, "local"))
    elif source.hf_name is not None and Path(source.hf_name).is_dir():
        files = list_files(Path(source.hf_name))
    else:
        files = []
    table = []
    if source.delta is not None:
        from tokenyard_train.data.sources.delta_table import describe_table

        table = [describe_table(source, key)]
    settings = source.model_dump(exclude_defaults=True, exclude={"path"})
    return [settings] * bool(settings) + table + [describe_file(file, key) for file in files]
