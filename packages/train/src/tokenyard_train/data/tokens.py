"""Streams of token ids, in memory or in a packed folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenyard import ConfigError, TokenyardError
from tokenyard.bounded import require_plain
from tokenyard_train.data.json_text import parse_json

Ids = NDArray[np.integer[Any]]
"""Token ids: uint16 or uint32, or the dtype of another tool's file."""

FORMAT = 1
BLOCK_BYTES = 1 << 20  # tokens.bin is hashed in blocks of this size
MANIFEST = "manifest.json"
TOKENS = "tokens.bin"  # ids of all documents
DOCUMENTS = "documents.bin"  # end position of each document, uint64
HASHES = "hashes.bin"  # SHA-256 of each block of tokens.bin
JOURNAL = "journal.jsonl"  # progress of an unfinished pack

_MANIFEST_TYPES: dict[str, type] = {
    "dtype": str,
    "tokens": int,
    "documents": int,
    "text_bytes": int,
    "vocab_size": int,
    "end": int,
    "tokenizer": str,
    "sources": list,
    "hashes": str,
    "documents_sha256": str,
}


class Tokens(Protocol):
    """A stream of ids, such as an array."""

    def __len__(self) -> int:
        """Return the number of ids."""
        ...

    def __getitem__(self, span: slice, /) -> Any:
        """Return the ids of a slice as an array."""
        ...


def ids_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the narrowest little-endian dtype for a vocabulary: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def check_ids(ids: Ids, vocab_size: int, location: str, hint: str = "") -> None:
    """Raise ConfigError if an id is outside the vocabulary. `hint` names what else may be wrong."""
    low = int(ids.min(initial=0))
    high = int(ids.max(initial=0))
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"{location} holds id {low if low < 0 else high}, and the tokenizer has {vocab_size} "
            f"ids; name the tokenizer that made the ids{hint}"
        )


class CorruptError(TokenyardError):
    """A packed file differs from what was written."""


class TokenFile:
    """A packed folder, mapped into memory. Each block is verified on its first read.

    So opening takes the same time for any size, and a flipped bit is found before training uses it.
    `ends` [documents] holds the position after each document's end id. Raises ConfigError if the
    folder is not packed or unfinished, and CorruptError if it was changed.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        dtype = np.dtype(self.manifest["dtype"])
        count = self.manifest["tokens"]
        self._tokens: NDArray[Any] = _map_file(self.folder / TOKENS, dtype, count)
        self.ends: NDArray[np.uint64] = _map_file(
            self.folder / DOCUMENTS, np.dtype("<u8"), self.manifest["documents"]
        )
        self._hashes = _read_bytes(self.folder / HASHES)
        _check_hash(self.folder / HASHES, self._hashes, self.manifest["hashes"])
        self._ids_per_block = BLOCK_BYTES // dtype.itemsize
        self._verified = np.zeros(-(-count // self._ids_per_block), dtype=bool)

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self._tokens)

    def __getitem__(self, span: slice) -> Ids:
        """Return the ids of a slice. Raises CorruptError, naming the block, if it was changed."""
        start, stop, step = span.indices(len(self))
        if stop > start:
            first = start // self._ids_per_block
            last = (stop - 1) // self._ids_per_block
            for block in first + np.flatnonzero(~self._verified[first : last + 1]):
                self._verify(int(block))
        return self._tokens[start:stop:step]

    def identity(self) -> str:
        """Return a digest of the ids and the document ends, wherever the folder is."""
        parts = [str(self.manifest[name]) for name in ("dtype", "hashes", "documents_sha256")]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def verify(self) -> None:
        """Verify every block and the document ends. Raises CorruptError."""
        for block in range(len(self._verified)):
            self._verify(block)
        path = self.folder / DOCUMENTS
        _check_hash(path, _read_bytes(path), self.manifest["documents_sha256"])

    def _verify(self, block: int) -> None:
        ids = self._tokens[block * self._ids_per_block : (block + 1) * self._ids_per_block]
        if hashlib.sha256(ids.tobytes()).digest() != self._hashes[32 * block : 32 * block + 32]:
            first = block * BLOCK_BYTES
            raise CorruptError(
                f"{self.folder / TOKENS} was changed after packing, "
                f"in bytes {first} to {first + ids.nbytes - 1}; "
                "pack the text again, or copy the file again"
            )
        check_ids(ids, self.manifest["vocab_size"], str(self.folder / TOKENS))
        self._verified[block] = True


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a packed folder's manifest.

    Raises ConfigError if it is missing or has another format, CorruptError if it was changed.
    """
    path = folder / MANIFEST
    require_plain(path)
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, PermissionError):
            problem = "cannot be read: Permission denied"
        elif not isinstance(error, FileNotFoundError) or not (folder / JOURNAL).exists():
            problem = "is not a packed folder; create one with tokenyard data pack"
        else:
            problem = "was not packed to the end; run the same tokenyard data pack again to resume"
        raise ConfigError(f"{str(folder)[:200]!r} {problem}") from None
    try:
        manifest: dict[str, Any] = parse_json(text)
        stated = manifest.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CorruptError(f"{path} is not a manifest; pack the text again") from None
    if stated != manifest_digest(manifest):
        raise CorruptError(
            f"{path} was changed after packing; pack the text again, or copy the folder again"
        )
    if manifest.get("format") != FORMAT:
        raise ConfigError(
            f"{path} has format {manifest.get('format')}, and this tokenyard reads {FORMAT}; "
            "pack it again"
        )
    for name, kind in _MANIFEST_TYPES.items():
        value: Any = manifest.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise CorruptError(f"{path} has {name} {value!r}; pack the text again")
    if manifest["dtype"] != ids_dtype(manifest["vocab_size"]).str:
        raise CorruptError(f"{path} has dtype {manifest['dtype']!r}; pack the text again")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _map_file(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    require_plain(path)
    size = path.stat().st_size if path.exists() else -1
    if size != count * dtype.itemsize:
        has = "is missing" if size < 0 else f"has {size} bytes"
        raise CorruptError(
            f"{path} {has}, and {count * dtype.itemsize} were packed; copy the folder again"
        )
    try:
        return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _read_bytes(path: Path) -> bytes:
    require_plain(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(
            f"{path} is missing; pack the text again, or copy the folder again"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _check_hash(path: Path, content: bytes, expected: str) -> None:
    if hashlib.sha256(content).hexdigest() != expected:
        raise CorruptError(
            f"{path} was changed after packing; pack the text again, or copy the file again"
        )
