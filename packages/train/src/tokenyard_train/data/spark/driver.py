"""The driver's part of a packing: sort, start the tasks, and join their shards in order."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from tokenyard import ConfigError, TokenyardError
from tokenyard.bounded import require_plain
from tokenyard_train.data.journal import PackProgress
from tokenyard_train.data.packing import (
    PACKED_FILES,
    delete_packed,
    finish_packing,
    packing_settings,
)
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.sources.text import no_column
from tokenyard_train.data.spark.executor import SCHEMA, Shard, ShardWriter
from tokenyard_train.data.text_loss import TextLoss
from tokenyard_train.data.tokenizer import build_tokenizer
from tokenyard_train.data.tokens import DOCUMENTS, JOURNAL, MANIFEST, TOKENS, CorruptError
from tokenyard_train.folder_lock import lock_folder

_SHARDS = ".shards-"
_COPIED = 1 << 22  # bytes at a time

log = logging.getLogger("tokenyard")


def pack(
    df: Any,
    out: Path | str,
    order: str | Sequence[str],
    *,
    text_key: str = "text",
    tokenizer: TokenizerConfig | None = None,
    source: str = "a DataFrame",
    overwrite: bool = False,
) -> PackProgress:
    """Tokenize a DataFrame on its executors into a packed folder; return the counts.

    `order` names columns that sort the rows, together unique and not null. The folder holds the
    bytes that `tokenyard data pack` writes for the rows in this order. The driver and all executors
    see `out` at one path. Each attempt of a task writes a shard of its own name, and the driver
    joins those of successful tasks. `source` describes the rows in the manifest.

    Raises ConfigError for a column that is missing, for rows without an order or with no text, and
    for a folder that is packed already; TokenyardError if Spark or a file fails.
    """
    folder = Path(out)
    columns = [order] if isinstance(order, str) else list(order)
    config = tokenizer or TokenizerConfig()
    built = build_tokenizer(config)
    sources = [{"spark": source, "order": columns, "text_key": text_key}]
    settings = packing_settings(built, sources)
    rows = _sorted_rows(df, columns, text_key)
    try:
        with lock_folder(folder):
            _prepare(folder, overwrite)
            with _shard_folder(folder) as shards:
                write = ShardWriter(str(shards), config.model_dump(), built.identity, text_key)
                done = _join(folder, shards, _run(rows, write), text_key)
            finish_packing(folder, settings, done, built)
    except OSError as error:
        raise TokenyardError(f"{folder} cannot be written: {error.strerror}") from None
    return done


@contextmanager
def _shard_folder(folder: Path) -> Iterator[Path]:
    """Context: a new folder for shards, which is deleted at the end."""
    shards = folder.absolute() / f"{_SHARDS}{uuid4().hex}"
    shards.mkdir()
    try:
        yield shards
    finally:
        shutil.rmtree(shards, ignore_errors=True)


def _sorted_rows(df: Any, order: list[str], text_key: str) -> Any:
    """Return the columns of the order, then the text, sorted. Raises ConfigError."""
    if not order:
        raise ConfigError("order names no column; give columns that sort the rows, such as id")
    for column in order:
        if column not in df.columns:
            raise ConfigError(
                f"order names {column!r}, and the DataFrame has {', '.join(df.columns)}; give "
                "columns that sort the rows"
            )
    if text_key not in df.columns:
        raise no_column(text_key, list(df.columns), "the DataFrame")
    quoted = ["`" + name.replace("`", "``") + "`" for name in [*order, text_key]]
    keys = [df[name].alias(f"order{i}") for i, name in enumerate(quoted[:-1])]
    selected = df.select(*keys, df[quoted[-1]].alias("text"))
    return selected.orderBy(*(f"order{i}" for i in range(len(order))))


def _prepare(folder: Path, overwrite: bool) -> None:
    """Delete what an interrupted packing left. Raises ConfigError for another packing."""
    for old in folder.glob(f"{_SHARDS}*"):
        shutil.rmtree(old)
    if overwrite:
        delete_packed(folder)
    for name in PACKED_FILES:
        require_plain(folder / name)
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{str(folder)!r} is packed already; give another folder, or overwrite")
    if (folder / JOURNAL).exists():
        raise ConfigError(
            f"{str(folder)!r} holds an unfinished packing of data pack; give another folder, or "
            "overwrite"
        )


def _run(rows: Any, write: ShardWriter) -> list[Shard]:
    """Run the tasks. Returns the shards in order. Raises ConfigError, or TokenyardError."""
    try:
        results = rows.mapInArrow(write, SCHEMA).collect()
    except Exception as error:  # errors come from Spark, the JVM and Python on executors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "Error" in line), "")
        first = lines[0] if lines else type(error).__name__
        reason = " ... ".join(dict.fromkeys((first[:300], last[:300])))
        raise TokenyardError(f"Spark could not tokenize the DataFrame: {reason}") from None
    shards = [Shard(**result.asDict()) for result in results]
    shards.sort(key=lambda shard: shard.partition)
    for shard in shards:
        if shard.error:
            raise ConfigError(shard.error)
    if len({shard.partition for shard in shards}) < len(shards):
        raise TokenyardError("Spark returned a partition twice; pack again")
    return shards


def _join(folder: Path, shards: Path, parts: list[Shard], text_key: str) -> PackProgress:
    """Append the shards to the files of the folder, and verify each."""
    done = PackProgress()
    loss = TextLoss()
    with (folder / TOKENS).open("wb") as tokens, (folder / DOCUMENTS).open("wb") as documents:
        for part in parts:
            digest = _append(shards / f"{part.name}.ids", tokens)
            ends = (shards / f"{part.name}.ends").read_bytes()
            digest.update(ends)
            if digest.hexdigest() != part.digest:
                raise CorruptError(
                    f"{shards / part.name}.ids is not what a task wrote; is {str(folder)!r} a "
                    "folder that all executors share?"
                )
            documents.write((np.frombuffer(ends, "<u8") + np.uint64(done.tokens)).tobytes())
            done = PackProgress(
                done.chunks + 1,
                done.tokens + part.tokens,
                done.documents + part.documents,
                done.text_bytes + part.text_bytes,
            )
            counts = json.loads(part.loss)
            loss.add(TextLoss(**counts | {"characters": set(counts["characters"])}))
    loss.warn(str(folder))
    nulls = sum(part.nulls for part in parts)
    if nulls:
        log.warning("%s: %d rows have null under %r; skipped", folder, nulls, text_key)
    return done


def _append(path: Path, file: BinaryIO) -> Any:
    """Append a file to another; return the hash of what was read. Raises TokenyardError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as part:
            while block := part.read(_COPIED):
                digest.update(block)
                file.write(block)
    except FileNotFoundError:
        raise TokenyardError(
            f"{path} of an executor is missing; give an output folder that the driver and all "
            "executors share"
        ) from None
    return digest
