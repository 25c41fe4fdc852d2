"""Documents of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean
from tokenyard_train.data.schema import Source
from tokenyard_train.optional import needs


def dataset_documents(source: Source, key: str) -> Iterator[bytes]:
    """Yield the documents of a dataset in its order. Raises ConfigError if it cannot be had or has no such column."""
    datasets = needs("datasets", f"{key}.hf_name", "tokenyard-train[datasets]")
    dataset = _load(datasets, source, key)
    columns = dataset.column_names
    if columns is not None and source.text_key not in columns:
        hint = did_you_mean(source.text_key, columns)
        has = ", ".join(columns)
        raise ConfigError(
            f"{key}.text_key is {source.text_key!r}{hint}, and {source.hf_name!r} has the columns {has}"
        )
    for row in dataset:
        yield str(row[source.text_key]).encode("utf-8", errors="replace")


def _load(datasets: Any, source: Source, key: str) -> Any:
    name, split = str(source.hf_name), source.split or "train"
    try:
        if (Path(name) / "dataset_info.json").exists() or (
            Path(name) / "dataset_dict.json"
        ).exists():
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, dict) else saved
        return datasets.load_dataset(name, split=split, streaming=source.streaming)
    except Exception as error:  # the library raises its own, the hub's, fsspec's and bare ones
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{key}.hf_name {name!r}, split {split!r}, cannot be loaded: {reason}"
        ) from None
