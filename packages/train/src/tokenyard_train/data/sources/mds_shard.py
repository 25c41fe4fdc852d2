"""Open a shard of an MDS folder, verify it, and locate the values of its columns.

A shard holds, in this order: the number of samples n, n + 1 offsets from the start of the file (all
uint32), a header in JSON that repeats the columns of the index, and the samples. A sample holds the
sizes (uint32) of its variable-size columns, then its columns.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenyard import ConfigError
from tokenyard.bounded import require_plain
from tokenyard.errors import did_you_mean
from tokenyard_train.data.json_text import parse_json
from tokenyard_train.data.sources.mds_index import Shard
from tokenyard_train.data.tokens import CorruptError
from tokenyard_train.optional import require

log = logging.getLogger("tokenyard")

_SAMPLED = 1 << 16  # bytes at each end of a shard without hashes that its digest covers


class Spans(NamedTuple):
    """Where a column's values are in a shard."""

    starts: NDArray[np.int64]  # [samples] bytes from the start of the file
    sizes: NDArray[np.int64]  # [samples] bytes


class ShardReader:
    """A shard, mapped into memory. A compressed shard is first unpacked beside itself.

    Raises ConfigError if a file is missing, CorruptError if it is not as its index says.
    """

    def __init__(self, folder: Path, shard: Shard, key: str):
        self.path = folder / shard.raw_data.basename
        self.shard = shard
        self.key = key
        if not self.path.exists() and shard.zip_data is not None:
            _unpack(folder / shard.zip_data.basename, self.path, shard, key)
        self._raw = _map_file(self.path, shard.raw_data.bytes, key)
        self._offsets = self._read_offsets()
        self._check_columns()

    def encoding(self, column: str) -> str:
        """Return a column's encoding. Raises ConfigError if there is no such column."""
        names = self.shard.column_names
        if column not in names:
            hint = did_you_mean(column, names)
            raise ConfigError(
                f"{self.key}: {self.path} has no column {column!r}{hint}; it has {', '.join(names)}"
            )
        return self.shard.column_encodings[names.index(column)]

    def spans(self, column: str) -> Spans:
        """Return where the values of a column are. Raises CorruptError if a sample is cut off."""
        begins = self._offsets[:-1]
        fixed = [size or 0 for size in self.shard.column_sizes]
        variable = [i for i, size in enumerate(self.shard.column_sizes) if not size]
        sizes = np.tile(np.array(fixed, dtype=np.int64), (len(begins), 1))
        room = self._offsets[1:] - begins - 4 * len(variable)
        if (room < 0).any():
            raise self._damaged(int(np.argmax(room < 0)))
        for number, i in enumerate(variable):
            sizes[:, i] = self._uint32(begins + 4 * number)
        wrong = sizes.sum(axis=1) != room
        if wrong.any():
            raise self._damaged(int(np.argmax(wrong)))
        i = self.shard.column_names.index(column)
        starts = begins + 4 * len(variable) + sizes[:, :i].sum(axis=1)
        return Spans(starts, sizes[:, i])

    def value(self, start: int, size: int) -> memoryview:
        """Return the bytes of a value."""
        return self._raw[start : start + size].data

    def check_hashes(self) -> None:
        """Raise CorruptError if the content does not have a hash of the index."""
        _check_hashes(self.path, self._raw, self.shard.raw_data.hashes)

    def digest(self) -> str:
        """Return a digest of the shard's hashes, or else of its size and first and last bytes."""
        if self.shard.raw_data.hashes:
            content = repr(sorted(self.shard.raw_data.hashes.items())).encode()
            return hashlib.sha256(content).hexdigest()
        sampled = hashlib.sha256(str(len(self._raw)).encode())
        for part in (self._raw[:_SAMPLED], self._raw[-_SAMPLED:]):
            sampled.update(part.tobytes())
        return sampled.hexdigest()

    def _read_offsets(self) -> NDArray[np.int64]:
        """Return the samples' offsets and the end of the last one [samples + 1]."""
        count = self.shard.samples
        table = 4 * (count + 2)
        stored = int(self._raw[:4].view("<u4")[0]) if len(self._raw) >= 4 else 0
        if stored != count or table > len(self._raw):
            raise CorruptError(
                f"{self.path} holds {stored} samples, and its index says {count}; "
                "copy the folder again"
            )
        offsets = self._raw[4:table].view("<u4").astype(np.int64)
        sound = offsets[0] >= table and offsets[-1] == len(self._raw)
        if not sound or (np.diff(offsets) < 0).any():
            raise CorruptError(f"{self.path} has offsets outside of it; copy the shard again")
        return offsets

    def _check_columns(self) -> None:
        """Raise CorruptError if the shard's own header has other columns than the index."""
        header = self._raw[4 * (self.shard.samples + 2) : self._offsets[0]].tobytes()
        try:
            columns = parse_json(header)
        except ValueError:
            columns = None
        if not isinstance(columns, dict):
            raise CorruptError(f"{self.path} has no header; copy the shard again")
        for name in ("column_names", "column_encodings", "column_sizes"):
            if name in columns and columns[name] != getattr(self.shard, name):
                raise CorruptError(
                    f"{self.path} has {name} {columns[name]}, and its index says "
                    f"{getattr(self.shard, name)}; copy the folder again"
                )

    def _uint32(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        stored = self._raw[positions[:, None] + np.arange(4)]  # [samples, 4]
        return stored.view("<u4")[:, 0].astype(np.int64)

    def _damaged(self, sample: int) -> CorruptError:
        return CorruptError(
            f"sample {sample} of {self.path} is not as long as its columns; copy the shard again"
        )


def _map_file(path: Path, size: int, key: str) -> NDArray[np.uint8]:
    require_plain(path)
    try:
        raw: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        reason = "missing or empty" if not isinstance(error, PermissionError) else "unreadable"
        raise ConfigError(f"{key}: {path} is {reason}; copy it again") from None
    if len(raw) != size:
        raise CorruptError(f"{path} has {len(raw)} bytes, and its index says {size}")
    return raw


def _unpack(packed: Path, target: Path, shard: Shard, key: str) -> None:
    algorithm = str(shard.compression).partition(":")[0]
    if algorithm not in _DECOMPRESS:
        raise ConfigError(
            f"{key}: {packed} is compressed by {algorithm}; {', '.join(_DECOMPRESS)} are read, "
            "unpack others beforehand"
        )
    size = shard.raw_data.bytes
    zip_data = shard.zip_data
    assert zip_data is not None
    require_plain(packed)
    try:
        content = packed.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {packed} cannot be read: {error.strerror}") from None
    if len(content) != zip_data.bytes:
        raise CorruptError(
            f"{packed} has {len(content)} bytes, and its index says {zip_data.bytes}"
        )
    _check_hashes(packed, np.frombuffer(content, dtype=np.uint8), zip_data.hashes)
    try:
        raw = _DECOMPRESS[algorithm](content, size)
        if len(raw) != size:
            raise ValueError(f"it has {len(raw)} bytes unpacked, and its index says {size}")
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        unfinished.write_bytes(raw)
        unfinished.replace(target)
    except ConfigError:
        raise
    except Exception as error:  # each decompressor has errors of its own
        raise ConfigError(f"{key}: {packed} cannot be unpacked beside itself: {error}") from None


def _zstd(content: bytes, size: int) -> bytes:
    zstandard = require("zstandard", "a shard compressed by zstd", "tokenyard-train[data]")
    stated = zstandard.frame_content_size(content)
    if stated not in (-1, size):
        raise ValueError(f"it has {stated} bytes, and its index says {size}")
    raw: bytes = zstandard.ZstdDecompressor().decompress(content, max_output_size=size)
    return raw


_DECOMPRESS: dict[str, Callable[[bytes, int], bytes]] = {
    "zstd": _zstd,
    "gz": lambda content, size: gzip.GzipFile(fileobj=io.BytesIO(content)).read(size + 1),
    "bz2": lambda content, size: bz2.BZ2File(io.BytesIO(content)).read(size + 1),
}
"""Unpack bytes, at most the given size or a little more. By the name in index.json."""


def _check_hashes(path: Path, content: NDArray[np.uint8], hashes: dict[str, str]) -> None:
    """Raise CorruptError if a hash differs. A warning names a hash that cannot be computed."""
    for name, expected in hashes.items():
        algorithm = _hash_algorithm(name)
        if algorithm is None:
            log.warning("%s is not checked: its hash %s needs xxhash", path, name)
        elif algorithm(content).hexdigest() != expected:
            raise CorruptError(f"{path} does not have the {name} of its index; copy it again")


def _hash_algorithm(name: str) -> Callable[..., Any] | None:
    if name in hashlib.algorithms_available:
        return lambda content: hashlib.new(name, content)
    try:
        library = importlib.import_module("xxhash")
    except ImportError:
        return None
    algorithm: Callable[..., Any] | None = getattr(library, name, None)
    return algorithm
