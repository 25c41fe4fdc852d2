"""Read documents from a source. Each module reads one kind of location, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources.files import describe_file, find_files, read_file


def read_documents(source: Source, key: str) -> Iterator[bytes]:
    """Yield the non-empty documents of a source as UTF-8.

    Raises ConfigError. `key` is the source's config key, for the error.
    """
    if source.hf_name is not None:
        from tokenyard_train.data.sources.hugging_face import dataset_documents

        documents = dataset_documents(source, key)
    elif source.local is not None:
        from tokenyard_train.data.sources.mds import mds_documents

        documents = mds_documents(mds_folder(source), source.text_key, f"{key}.local")
    else:
        files = find_files(source.path or [], source.suffixes, f"{key}.path")
        documents = (
            text for file in files for text in read_file(file, source.text_key, f"{key}.path")
        )
    return (document for document in documents if document)


def mds_folder(source: Source) -> Path:
    """Return the folder of a source's MDS shards: `local`, or its subfolder `split`."""
    return Path(str(source.local), source.split or "")


def describe_source(source: Source, key: str) -> list[dict[str, Any]]:
    """Return a description that identifies a source's content, without reading all of it."""
    if source.path is None:
        return [source.model_dump(exclude_defaults=True)]
    return [describe_file(file) for file in find_files(source.path, source.suffixes, f"{key}.path")]
