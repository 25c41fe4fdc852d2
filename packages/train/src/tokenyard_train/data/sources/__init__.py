"""Where documents come from: each module reads one kind of place, in an order that is always the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources.files import describe_file, documents_of, files_of


def read_documents(source: Source, key: str) -> Iterator[bytes]:
    """Yield the documents of a source, UTF-8, empty ones left out. Raises ConfigError; `key` is where the config is."""
    if source.hf_name is not None:
        from tokenyard_train.data.sources.hugging_face import dataset_documents

        found = dataset_documents(source, key)
    elif source.local is not None:
        from tokenyard_train.data.sources.mds import mds_documents

        found = mds_documents(mds_folder(source), source.text_key, f"{key}.local")
    else:
        files = files_of(source.path or [], source.suffixes, f"{key}.path")
        found = (
            text for file in files for text in documents_of(file, source.text_key, f"{key}.path")
        )
    return (document for document in found if document)


def mds_folder(source: Source) -> Path:
    """Return the folder of a source's MDS shards: `local`, or the split's folder in it."""
    return Path(str(source.local), source.split or "")


def describe_source(source: Source, key: str) -> list[dict[str, Any]]:
    """Return what tells a source's content from another's, without reading all of it."""
    if source.path is None:
        return [source.model_dump(exclude_defaults=True)]
    return [describe_file(file) for file in files_of(source.path, source.suffixes, f"{key}.path")]
