"""Read documents from Hugging Face datasets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.data.schema import RowSource, Source
from tokenyard_train.data.sources.keys import key_below
from tokenyard_train.data.sources.text import no_column, row_text
from tokenyard_train.optional import require

log = logging.getLogger("tokenyard")


def dataset_documents(source: Source, key: str) -> Iterator[bytes | None]:
    """Yield a dataset's documents in its order; None for a row whose text is null.

    Raises ConfigError if the dataset cannot be loaded, or has no text in its column `text_key`.
    """
    dataset = _load(source, key)
    columns = dataset.column_names
    if columns is not None and source.text_key not in columns:
        raise no_column(source.text_key, columns, f"{key_below(key, 'hf_name')} {source.hf_name!r}")
    for location, row in _rows(dataset, source, key):
        yield row_text(row, source.text_key, location)


def dataset_rows(source: RowSource, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the location and the columns of each row of a dataset. Raises ConfigError."""
    yield from _rows(_load(source, key), source, key)


def _rows(dataset: Any, source: Source | RowSource, key: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, row in enumerate(dataset, 1):
            yield f"{key_below(key, 'hf_name')} {source.hf_name!r} row {number}", row
    except ConfigError:
        raise
    except Exception as error:  # errors come from datasets, pyarrow and fsspec
        raise ConfigError(
            f"{key_below(key, 'hf_name')} {source.hf_name!r} cannot be read after row {number}: "
            f"{_reason(error)}"
        ) from None


def _load(source: Source | RowSource, key: str) -> Any:
    datasets = require("datasets", key_below(key, "hf_name"), "tokenyard-train[datasets]")
    name = str(source.hf_name)
    split = source.split or "train"
    try:
        if _is_saved_to_disk(Path(name)):
            saved = datasets.load_from_disk(name)
            return _split_of(saved, source, key)
        dataset = datasets.load_dataset(name, split=split, streaming=source.streaming)
        _refuse_lines(dataset, name, key)
        return dataset
    except ConfigError:
        raise
    except Exception as error:  # errors come from datasets, the hub and fsspec, some bare
        raise ConfigError(
            f"{key_below(key, 'hf_name')} {name!r}, split {split!r}, cannot be loaded: "
            f"{_reason(error)}"
        ) from None


def _refuse_lines(dataset: Any, name: str, key: str) -> None:
    """Raise ConfigError for a folder of text files, of which each line would be a document."""
    if getattr(dataset.info, "builder_name", None) != "text":
        return
    problem = (
        f"{key_below(key, 'hf_name')} {name!r} holds files of text, and datasets makes a row of "
        "each line"
    )
    if Path(name).is_dir():
        raise ConfigError(f"{problem}; give the folder by path, so that each file is one document")
    log.warning("%s, so each line is a document", problem)


def _split_of(saved: Any, source: Source | RowSource, key: str) -> Any:
    """Return a split of what `save_to_disk` wrote. Raises ConfigError if it has no such split."""
    if isinstance(saved, dict):
        split = source.split or "train"
        if split not in saved:
            raise ConfigError(
                f"{key_below(key, 'split')} is {split!r}, and {key_below(key, 'hf_name')} "
                f"{source.hf_name!r} has the splits {', '.join(saved)}; give one of them"
            )
        return saved[split]
    if source.split not in (None, str(saved.split)):
        raise ConfigError(
            f"{key_below(key, 'split')} is {source.split!r}, and {key_below(key, 'hf_name')} "
            f"{source.hf_name!r} is one dataset without splits (saved from {saved.split}); "
            "leave split out"
        )
    return saved


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_saved_to_disk(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote the folder: a dataset, or a dict of splits."""
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
