"""Read MDS, the shard format of mosaicml-streaming. Nothing is unpickled.

A folder holds index.json and shards. A shard holds, in this order: the number of samples n, n + 1
offsets from the start of the file (all uint32), a header that index.json repeats, and the samples.
A sample holds the sizes (uint32) of its variable-size columns, then its columns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean
from tokenyard_train.data.tokens import CorruptError, Ids, ids_dtype
from tokenyard_train.optional import require


class Shard(NamedTuple):
    """A shard that index.json lists."""

    path: Path
    names: list[str]  # of the columns
    encodings: list[str]  # of the columns
    sizes: list[int | None]  # bytes of each column; None: variable
    samples: int
    info: dict[str, Any]  # the shard's entry in index.json


def mds_documents(folder: Path, text_key: str, key: str) -> Iterator[bytes]:
    """Yield the texts of a column.

    Raises ConfigError if the folder or the column is missing, or if the column is not text.
    """
    for shard in read_index(folder, key):
        encoding = _encoding(shard, text_key, key)
        if encoding not in ("str", "bytes"):
            raise ConfigError(
                f"{key}: column {text_key!r} of {folder} is {encoding}; text is str or bytes"
            )
        raw = _map_shard(shard, key)
        for i in range(shard.samples):
            yield _column(raw, shard, i, text_key)


class MdsTokens:
    """The `tokens` column of MDS shards as one stream of ids.

    All samples must have the same length, so that a position locates its sample by arithmetic.
    Raises ConfigError if lengths differ, or if the column is not made of integers.
    """

    def __init__(self, folder: Path, vocab_size: int, key: str):
        self.shards = read_index(folder, key)
        self._raw = [_map_shard(shard, key) for shard in self.shards]
        self._stored = _stored_dtype(_encoding(self.shards[0], "tokens", key), key)
        self._dtype = ids_dtype(vocab_size)
        sample = _column(self._raw[0], self.shards[0], 0, "tokens")
        self.length = len(sample) // self._stored.itemsize
        _check_lengths(self._raw, self.shards, key)
        self._firsts = np.cumsum([0, *(shard.samples for shard in self.shards)])

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._firsts[-1]) * self.length

    def __getitem__(self, span: slice) -> Ids:
        """Return the ids of a slice."""
        start, stop, step = span.indices(len(self))
        if stop <= start:
            return np.empty(0, self._dtype)
        first = start // self.length
        last = (stop - 1) // self.length
        ids = np.concatenate([self._sample(i) for i in range(first, last + 1)])
        return ids[start - first * self.length : stop - first * self.length : step]

    def _sample(self, index: int) -> Ids:
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        row = index - int(self._firsts[shard])
        raw = _column(self._raw[shard], self.shards[shard], row, "tokens")
        return np.frombuffer(raw, dtype=self._stored).astype(self._dtype)


def has_tokens(folder: Path, key: str) -> bool:
    """Return whether the shards hold ids (LLM Foundry's --concat_tokens) instead of text."""
    return "tokens" in read_index(folder, key)[0].names


def read_index(folder: Path, key: str) -> list[Shard]:
    """Return the non-empty shards that a folder's index.json lists.

    Raises ConfigError if the index is missing, malformed or without samples.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = [_shard(folder, entry) for entry in index["shards"]]
    except OSError:
        raise ConfigError(
            f"{key} {str(folder)!r} has no index.json; give a folder of MDS shards (see split)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {path} is not an index of MDS shards: {error!r}") from None
    if not sum(shard.samples for shard in shards):
        raise ConfigError(f"{key}: {path} lists no samples")
    return [shard for shard in shards if shard.samples]


def _shard(folder: Path, entry: dict[str, Any]) -> Shard:
    if entry["format"] != "mds":
        raise ValueError(f"format {entry['format']}")
    name = entry["raw_data"]["basename"]
    if Path(name).name != name:
        raise ValueError(f"a shard outside the folder: {name}")
    columns = entry["column_names"], entry["column_encodings"], entry["column_sizes"]
    return Shard(folder / name, *columns, entry["samples"], entry)


def _encoding(shard: Shard, column: str, key: str) -> str:
    if column not in shard.names:
        hint = did_you_mean(column, shard.names)
        raise ConfigError(
            f"{key}: {shard.path} has no column {column!r}{hint}; it has {', '.join(shard.names)}"
        )
    return shard.encodings[shard.names.index(column)]


def _map_shard(shard: Shard, key: str) -> memoryview:
    """Map a shard into memory. A compressed shard is first unpacked beside itself."""
    if not shard.path.exists() and shard.info.get("zip_data"):
        _unpack(shard, key)
    try:
        raw = np.memmap(shard.path, dtype=np.uint8, mode="r").data
    except (OSError, ValueError):
        raise ConfigError(f"{key}: {shard.path} is missing or empty; copy it again") from None
    expected = shard.info["raw_data"]["bytes"]
    if len(raw) != expected:
        raise CorruptError(f"{shard.path} has {len(raw)} bytes, and its index says {expected}")
    return raw


def _unpack(shard: Shard, key: str) -> None:
    packed = shard.info["zip_data"]
    algorithm = str(shard.info.get("compression")).partition(":")[0]
    path = shard.path.with_name(Path(packed["basename"]).name)
    if algorithm != "zstd":
        raise ConfigError(
            f"{key}: {path} is compressed by {algorithm}; zstd is read, unpack others beforehand"
        )
    zstandard = require("zstandard", f"{path.name}", "tokenyard-train[data]")
    try:
        content = path.read_bytes()
        _check_hashes(path, content, packed.get("hashes", {}))
        raw = zstandard.ZstdDecompressor().decompress(
            content, max_output_size=shard.info["raw_data"]["bytes"]
        )
        unfinished = shard.path.with_name(f"{shard.path.name}.{os.getpid()}")
        unfinished.write_bytes(raw)
        unfinished.replace(shard.path)
    except (OSError, zstandard.ZstdError) as error:
        raise ConfigError(f"{key}: {path} cannot be unpacked beside itself: {error}") from None


def _check_hashes(path: Path, content: bytes, hashes: dict[str, str]) -> None:
    for name, expected in hashes.items():
        if (
            name in hashlib.algorithms_available
            and hashlib.new(name, content).hexdigest() != expected
        ):
            raise CorruptError(f"{path} does not have the {name} of its index; copy it again")


def _column(raw: memoryview, shard: Shard, index: int, column: str) -> bytes:
    """Return the bytes of a sample's column. Raises CorruptError if the sample is too short."""
    begin, end = np.frombuffer(raw, dtype="<u4", count=2, offset=4 * (1 + index)).tolist()
    variable = sum(size is None for size in shard.sizes)
    stored_sizes = iter(np.frombuffer(raw, dtype="<u4", count=variable, offset=begin).tolist())
    offset = begin + 4 * variable
    for name, fixed in zip(shard.names, shard.sizes):
        size = next(stored_sizes) if fixed is None else fixed
        if offset + size > end:
            break
        if name == column:
            return bytes(raw[offset : offset + size])
        offset += size
    raise CorruptError(
        f"sample {index} of {shard.path} is not as long as its columns; copy the shard again"
    )


def _stored_dtype(encoding: str, key: str) -> np.dtype[Any]:
    """Return the dtype of stored ids. Raises ConfigError for an encoding that is not read.

    `bytes` is int64, as LLM Foundry first wrote it. `ndarray:<dtype>:<length>` names its dtype.
    """
    kind, _, rest = encoding.partition(":")
    name = "int64" if encoding == "bytes" else rest.partition(":")[0]
    shaped = encoding == "bytes" or (kind == "ndarray" and rest.count(":") == 1)
    if not shaped or name not in ("uint16", "uint32", "int32", "int64", "uint64", "int16"):
        raise ConfigError(
            f"{key}: column 'tokens' is {encoding}; "
            "bytes (of int64) and ndarray:<integers>:<length> are read"
        )
    return np.dtype(name).newbyteorder("<")


def _check_lengths(raw: list[memoryview], shards: list[Shard], key: str) -> None:
    """Raise ConfigError if a sample's length differs from the first sample's."""
    first = np.frombuffer(raw[0], dtype="<u4", count=2, offset=4)
    for content, shard in zip(raw, shards):
        offsets = np.frombuffer(content, dtype="<u4", count=shard.samples + 1, offset=4)
        if shard.names == ["tokens"] and (np.diff(offsets) != first[1] - first[0]).any():
            raise ConfigError(
                f"{key}: {shard.path} holds samples of several lengths; pack the text instead"
            )
