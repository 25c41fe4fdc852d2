"""Read documents from Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean
from tokenyard_train.data.schema import Source
from tokenyard_train.optional import require


def dataset_documents(source: Source, key: str) -> Iterator[bytes]:
    """Yield a dataset's documents in its order.

    Raises ConfigError if the dataset cannot be loaded or has no column `text_key`.
    """
    datasets = require("datasets", f"{key}.hf_name", "tokenyard-train[datasets]")
    dataset = _load(datasets, source, key)
    columns = dataset.column_names
    if columns is not None and source.text_key not in columns:
        hint = did_you_mean(source.text_key, columns)
        raise ConfigError(
            f"{key}.text_key is {source.text_key!r}{hint}, "
            f"and {source.hf_name!r} has the columns {', '.join(columns)}"
        )
    for row in dataset:
        yield str(row[source.text_key]).encode("utf-8", errors="replace")


def _load(datasets: Any, source: Source, key: str) -> Any:
    name = str(source.hf_name)
    split = source.split or "train"
    try:
        if _is_saved_to_disk(Path(name)):
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, dict) else saved
        return datasets.load_dataset(name, split=split, streaming=source.streaming)
    except Exception as error:  # errors come from datasets, the hub and fsspec, some bare
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{key}.hf_name {name!r}, split {split!r}, cannot be loaded: {reason}"
        ) from None


def _is_saved_to_disk(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote the folder: a dataset, or a dict of splits."""
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
