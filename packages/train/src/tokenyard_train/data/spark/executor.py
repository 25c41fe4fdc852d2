"""The executors' part of a packing: a task tokenizes one partition into a shard of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.sources.text import document_text
from tokenyard_train.data.text_loss import LossCounter, TextLoss
from tokenyard_train.data.tokenizer import Tokenizer, build_tokenizer
from tokenyard_train.data.tokens import ids_dtype
from tokenyard_train.optional import require

_BUFFER = 1 << 20  # bytes that are written at a time


class Shard(NamedTuple):
    """The result of a task."""

    partition: int  # its place in the order
    name: str = ""  # of its files, without their suffixes
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    nulls: int = 0  # rows without text, which are skipped
    digest: str = ""  # SHA-256 of the ids and the ends
    loss: str = ""  # JSON of a TextLoss
    error: str = ""  # a sentence, if the rows cannot be packed


SCHEMA = (
    "partition long, name string, tokens long, documents long, text_bytes long, nulls long, "
    "digest string, loss string, error string"
)
"""The columns of a Shard in Spark's terms."""


class ShardWriter(NamedTuple):
    """Tokenizes the rows of a partition. Spark sends it to the executors.

    Each attempt of a task writes files of a new name into `folder`, so that two attempts never
    write the same file. In its rows, the columns that sort them come before the text.
    """

    folder: str
    config: dict[str, Any]  # of the tokenizer
    tokenizer: str  # its identity on the driver
    text_key: str

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield one row: the Shard of these rows. A mistake of the user is in its `error`."""
        arrow = require("pyarrow", "packing by Spark", "tokenyard-train[spark]")
        spark = require("pyspark", "packing by Spark", "tokenyard-train[spark]")
        context = spark.TaskContext.get()
        partition = 0 if context is None else context.partitionId()
        try:
            shard = self.write(partition, batches)
        except ConfigError as error:
            shard = Shard(partition, error=str(error))
        yield arrow.RecordBatch.from_pylist([shard._asdict()])

    def write(self, partition: int, batches: Iterable[Any]) -> Shard:
        """Write the shard of some rows. Raises ConfigError, naming the row."""
        counter = LossCounter(self._tokenizer())
        dtype = ids_dtype(counter.tokenizer.vocab_size)
        end = np.array([counter.tokenizer.end], dtype)
        name = f"{partition:06}-{uuid4().hex}"
        lengths: list[int] = []  # of the documents, in ids
        nulls = 0
        text_bytes = 0
        digest = hashlib.sha256()
        # The driver checks the digest, so neither file is synced: both are copied and deleted.
        with Path(self.folder, f"{name}.ids").open("wb", _BUFFER) as file:
            for text in self._documents(batches):
                nulls += text is None
                if text:
                    ids = counter.encode(text).astype(dtype, copy=False)
                    for part in (ids, end):
                        digest.update(part.data)
                        file.write(part.data)
                    lengths.append(len(ids) + 1)
                    text_bytes += len(text)
        ends = np.cumsum(lengths, dtype="<u8").tobytes()
        digest.update(ends)
        Path(self.folder, f"{name}.ends").write_bytes(ends)
        counts = (sum(lengths), len(lengths), text_bytes, nulls)
        return Shard(partition, name, *counts, digest.hexdigest(), _as_json(counter.loss))

    def _tokenizer(self) -> Tokenizer:
        """Build the tokenizer. Raises ConfigError if it is not the driver's."""
        tokenizer = build_tokenizer(parse(TokenizerConfig, self.config))
        if tokenizer.identity != self.tokenizer:
            raise ConfigError(
                f"the tokenizer {self.config['name']!r} has other content on an executor than on "
                "the driver; copy it to the same path on all of them"
            )
        return tokenizer

    def _documents(self, batches: Iterable[Any]) -> Iterator[bytes | None]:
        """Yield the texts. Raises ConfigError if the order is not unique."""
        before: list[Any] | None = None
        for batch in batches:
            *columns, texts = (_as_bytes(batch.column(i)) for i in range(batch.num_columns))
            keys = zip(*(column.to_pylist() for column in columns))
            for key, text in zip(keys, texts):
                if any(value is None or value != value for value in key):
                    raise ConfigError(
                        f"a row has null or NaN in its order {list(key)}; give it a value"
                    )
                if list(key) == before:
                    raise ConfigError(
                        f"two rows have the order {before}, so the result would differ from run to "
                        "run; name further columns, until each row has its own"
                    )
                before = list(key)
                yield document_text(text.as_py(), self.text_key, f"the row of order {before}")


def _as_bytes(column: Any) -> Any:
    """Return a column of strings as bytes: Spark does not check that its strings are UTF-8."""
    arrow = require("pyarrow", "packing by Spark", "tokenyard-train[spark]")
    kind = column.type
    is_text = arrow.types.is_string(kind) or arrow.types.is_large_string(kind)
    return column.cast(arrow.large_binary()) if is_text else column


def _as_json(loss: TextLoss) -> str:
    return json.dumps(asdict(loss) | {"characters": sorted(loss.characters)})
