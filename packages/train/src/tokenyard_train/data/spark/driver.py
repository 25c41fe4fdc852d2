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
    sync,
)
from tokenyard_train.data.paths import local_output
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.sources.text import no_column
from tokenyard_train.data.spark.executor import SCHEMA, Shard, ShardWriter
from tokenyard_train.data.text_loss import TextLoss
from tokenyard_train.data.tokenizer import build_tokenizer
from tokenyard_train.data.tokens import DOCUMENTS, JOURNAL, MANIFEST, TOKENS, CorruptError
from tokenyard_train.folder_lock import lock_folder
from tokenyard_train.hide_secrets import hide_secrets

_SHARDS = ".shards-"
_COPIED = 1 << 22  # bytes at a time
_BINARY = "UTF8_BINARY"  # the collation under which equal strings have equal bytes

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
    folder = local_output(out)
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
    try:
        keys = [df[name].alias(f"order{i}") for i, name in enumerate(quoted[:-1])]
        selected = df.select(*keys, df[quoted[-1]].alias("text"))
        rows = selected.orderBy(*(f"order{i}" for i in range(len(order))))
        kinds = [field.dataType for field in rows.schema.fields[:-1]]
    except Exception as error:  # errors come from Spark's analysis of the columns
        raise ConfigError(
            f"the DataFrame cannot be sorted by {', '.join(order)}: {reason_of(error)}"
        ) from None
    for name, kind in zip(order, kinds):
        collation = getattr(kind, "collation", _BINARY)
        if collation != _BINARY:
            raise ConfigError(
                f"order names {name!r}, whose collation {collation} sorts different strings as "
                f"equal; give a column of the collation {_BINARY}"
            )
    return rows


def reason_of(error: Exception) -> str:
    """Return the first line of an error of Spark, without secrets of the environment.

    The line that py4j puts before it is left out.
    """
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip(" :")]
    if len(lines) > 1 and lines[0].startswith("An error occurred while calling"):
        lines = lines[1:]
    return hide_secrets(lines[0])[:300] if lines else type(error).__name__


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
        reason = " ... ".join(dict.fromkeys(hide_secrets(line)[:300] for line in (first, last)))
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
    """Append the shards to the files of the folder, verify each, and delete it."""
    done = PackProgress()
    loss = TextLoss()
    with (folder / TOKENS).open("wb") as tokens, (folder / DOCUMENTS).open("wb") as documents:
        for part in parts:
            ends = _append(shards, part, tokens)
            documents.write((np.frombuffer(ends, "<u8") + np.uint64(done.tokens)).tobytes())
            done = PackProgress(
                done.chunks + 1,
                done.tokens + part.tokens,
                done.documents + part.documents,
                done.text_bytes + part.text_bytes,
            )
            counts = json.loads(part.loss)
            loss.add(TextLoss(**counts | {"characters": set(counts["characters"])}))
        for file in (tokens, documents):
            sync(file)
    loss.warn(str(folder))
    nulls = sum(part.nulls for part in parts)
    if nulls:
        log.warning("%s: %d rows have null under %r; skipped", folder, nulls, text_key)
    return done


def _append(shards: Path, part: Shard, tokens: BinaryIO) -> bytes:
    """Append the ids of a shard to a file, and delete the shard; return its ends.

    Raises TokenyardError if it is missing or changed.
    """
    digest = hashlib.sha256()
    ids = shards / f"{part.name}.ids"
    ends = shards / f"{part.name}.ends"
    try:
        with ids.open("rb") as file:
            while block := file.read(_COPIED):
                digest.update(block)
                tokens.write(block)
        content = ends.read_bytes()
    except FileNotFoundError as error:
        raise TokenyardError(
            f"{error.filename} of an executor is missing; give an output folder that the driver "
            "and all executors share"
        ) from None
    digest.update(content)
    if digest.hexdigest() != part.digest:
        raise CorruptError(
            f"{ids} is not what a task wrote; is {str(shards.parent)!r} a folder that all "
            "executors share?"
        )
    ids.unlink()
    ends.unlink()
    return content
