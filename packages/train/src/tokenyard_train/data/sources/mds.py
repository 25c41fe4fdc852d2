"""MDS, the shard format of mosaicml-streaming, read for those who have such data; nothing is ever unpickled.

A folder holds index.json and shards. A shard is: the number of samples n, n + 1 offsets (all uint32, from the start of
the file), a header that index.json repeats, and the samples. A sample is the sizes (uint32) of its columns without a
fixed size, and then its columns one after another.
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
from tokenyard_train.optional import needs


class Shard(NamedTuple):
    """A shard of an index: its file, the columns' names, encodings and fixed sizes, and how many samples it holds."""

    path: Path
    names: list[str]
    encodings: list[str]
    sizes: list[int | None]
    samples: int
    info: dict[str, Any]  # as in index.json


def mds_documents(folder: Path, text_key: str, key: str) -> Iterator[bytes]:
    """Yield the texts of a column. Raises ConfigError for a folder or column that is not there, or holds no text."""
    for shard in read_index(folder, key):
        if _encoding(shard, text_key, key) not in ("str", "bytes"):
            raise ConfigError(
                f"{key}: column {text_key!r} of {folder} is {_encoding(shard, text_key, key)}; text is str or bytes"
            )
        raw = _mapped(shard, key)
        for i in range(shard.samples):
            yield _column(raw, shard, i, text_key)


class MdsTokens:
    """The `tokens` column of MDS shards as one stream of ids, found by computation: all samples have one length.

    Raises ConfigError if they have not, or if the column is not made of integers.
    """

    def __init__(self, folder: Path, vocab_size: int, key: str):
        self.shards = read_index(folder, key)
        self._raw = [_mapped(shard, key) for shard in self.shards]
        self._stored = _integers(_encoding(self.shards[0], "tokens", key), key)
        self._dtype = ids_dtype(vocab_size)
        self.length = (
            len(_column(self._raw[0], self.shards[0], 0, "tokens")) // self._stored.itemsize
        )
        _check_lengths(self._raw, self.shards, key)
        self._firsts = np.cumsum([0, *(shard.samples for shard in self.shards)])

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._firsts[-1]) * self.length

    def __getitem__(self, place: slice) -> Ids:
        """Return the ids of a slice."""
        start, stop, step = place.indices(len(self))
        if stop <= start:
            return np.empty(0, self._dtype)
        first, last = start // self.length, (stop - 1) // self.length
        ids = np.concatenate([self._sample(i) for i in range(first, last + 1)])
        return ids[start - first * self.length : stop - first * self.length : step]

    def _sample(self, index: int) -> Ids:
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        raw = _column(
            self._raw[shard], self.shards[shard], index - int(self._firsts[shard]), "tokens"
        )
        return np.frombuffer(raw, dtype=self._stored).astype(self._dtype)


def has_tokens(folder: Path, key: str) -> bool:
    """Say whether the shards hold ids (LLM Foundry's --concat_tokens) rather than text."""
    return "tokens" in read_index(folder, key)[0].names


def read_index(folder: Path, key: str) -> list[Shard]:
    """Return the shards that a folder's index.json lists. Raises ConfigError for a folder without one."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = [_shard(folder, entry) for entry in index["shards"]]
    except OSError:
        raise ConfigError(
            f"{key} {str(folder)!r} has no index.json; give a folder of MDS shards (see split)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {path} is no index of MDS shards: {error!r}") from None
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


def _mapped(shard: Shard, key: str) -> memoryview:
    """Map a shard into memory; one that is compressed is first unpacked beside itself, as streaming does."""
    if not shard.path.exists() and shard.info.get("zip_data"):
        _unpack(shard, key)
    try:
        raw = np.memmap(shard.path, dtype=np.uint8, mode="r").data
    except (OSError, ValueError):
        raise ConfigError(f"{key}: {shard.path} is missing or empty; bring it here again") from None
    if len(raw) != shard.info["raw_data"]["bytes"]:
        raise CorruptError(
            f"{shard.path} has {len(raw)} bytes, and its index says {shard.info['raw_data']['bytes']}"
        )
    return raw


def _unpack(shard: Shard, key: str) -> None:
    packed, algorithm = shard.info["zip_data"], str(shard.info.get("compression")).partition(":")[0]
    path = shard.path.with_name(Path(packed["basename"]).name)
    if algorithm != "zstd":
        raise ConfigError(
            f"{key}: {path} is compressed by {algorithm}; zstd is read, others unpack beforehand"
        )
    zstandard = needs("zstandard", f"{path.name}", "tokenyard-train[data]")
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
            raise CorruptError(f"{path} does not have the {name} of its index; bring it here again")


def _column(raw: memoryview, shard: Shard, index: int, column: str) -> bytes:
    begin, end = np.frombuffer(raw, dtype="<u4", count=2, offset=4 * (1 + index)).tolist()
    open_sizes = sum(size is None for size in shard.sizes)
    stored = np.frombuffer(raw, dtype="<u4", count=open_sizes, offset=begin).tolist()
    place = begin + 4 * open_sizes
    for name, fixed in zip(shard.names, shard.sizes):
        size = stored.pop(0) if fixed is None else fixed
        if place + size > end:
            break
        if name == column:
            return bytes(raw[place : place + size])
        place += size
    raise CorruptError(
        f"sample {index} of {shard.path} is not as long as its columns; bring the shard here again"
    )


def _integers(encoding: str, key: str) -> np.dtype[Any]:
    """Return how ids are stored: `bytes` is int64 (LLM Foundry's first way), `ndarray:<dtype>:<length>` says."""
    kind, _, rest = encoding.partition(":")
    name = "int64" if encoding == "bytes" else rest.partition(":")[0]
    shaped = encoding == "bytes" or (kind == "ndarray" and rest.count(":") == 1)
    if not shaped or name not in ("uint16", "uint32", "int32", "int64", "uint64", "int16"):
        raise ConfigError(
            f"{key}: column 'tokens' is {encoding}; bytes (of int64) and ndarray:<integers>:<length> are read"
        )
    return np.dtype(name).newbyteorder("<")


def _check_lengths(raw: list[memoryview], shards: list[Shard], key: str) -> None:
    for one, shard in zip(raw, shards):
        offsets = np.frombuffer(one, dtype="<u4", count=shard.samples + 1, offset=4)
        first = np.frombuffer(raw[0], dtype="<u4", count=2, offset=4)
        if shard.names == ["tokens"] and (np.diff(offsets) != first[1] - first[0]).any():
            raise ConfigError(
                f"{key}: {shard.path} holds samples of several lengths; pack the text instead"
            )
