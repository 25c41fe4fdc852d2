"""Streams of token ids: what samples are cut from, in memory or in a packed file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenyard import ConfigError, TokenyardError

Ids = NDArray[np.unsignedinteger[Any]]
"""Token ids, uint16 or uint32."""

FORMAT = 1
BLOCK_BYTES = 1 << 20  # of tokens.bin; each has a hash of its own
MANIFEST, TOKENS, DOCUMENTS, HASHES = "manifest.json", "tokens.bin", "documents.bin", "hashes.bin"


class Tokens(Protocol):
    """A stream of ids; an array is one."""

    def __len__(self) -> int:
        """Return the number of ids."""
        ...

    def __getitem__(self, place: slice, /) -> Any:
        """Return the ids of a slice as an array."""
        ...


def ids_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the narrowest type that holds every id of a vocabulary: uint16 or uint32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class CorruptError(TokenyardError):
    """A packed file is not what was written."""


class TokenFile:
    """A packed folder, mapped into memory; each block is verified when it is read for the first time.

    So opening costs the same for any size, and a flipped bit is found before it is trained on. `ends` [documents] holds
    the position after each document's last id, its end id included. Raises ConfigError for a folder that is none or
    unfinished, and CorruptError for one that was changed.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        dtype, count = np.dtype(self.manifest["dtype"]), self.manifest["tokens"]
        self._tokens: NDArray[Any] = _mapped(self.folder / TOKENS, dtype, count)
        self.ends: NDArray[np.uint64] = _mapped(
            self.folder / DOCUMENTS, np.dtype("<u8"), self.manifest["documents"]
        )
        self._hashes = (self.folder / HASHES).read_bytes()
        _check_hash(self.folder / HASHES, self._hashes, self.manifest["hashes"])
        self._ids_per_block = BLOCK_BYTES // dtype.itemsize
        self._verified = np.zeros(-(-count // self._ids_per_block), dtype=bool)

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self._tokens)

    def __getitem__(self, place: slice) -> Ids:
        """Return the ids of a slice. Raises CorruptError, naming the block, if they are not what was packed."""
        start, stop, step = place.indices(len(self))
        if stop > start:
            first, last = start // self._ids_per_block, (stop - 1) // self._ids_per_block
            for block in first + np.flatnonzero(~self._verified[first : last + 1]):
                self._verify(int(block))
        return self._tokens[start:stop:step]

    def verify(self) -> None:
        """Read and check everything. Raises CorruptError."""
        for block in range(len(self._verified)):
            self._verify(block)
        path = self.folder / DOCUMENTS
        _check_hash(path, path.read_bytes(), self.manifest["documents_sha256"])

    def _verify(self, block: int) -> None:
        ids = self._tokens[block * self._ids_per_block : (block + 1) * self._ids_per_block]
        if hashlib.sha256(ids.tobytes()).digest() != self._hashes[32 * block : 32 * block + 32]:
            first = block * BLOCK_BYTES
            raise CorruptError(
                f"{self.folder / TOKENS} was changed after packing, in bytes {first} to {first + ids.nbytes - 1}; "
                "pack the text again, or copy the file anew"
            )
        self._verified[block] = True


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a packed folder's manifest. Raises ConfigError where there is none, CorruptError if it was changed."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        what = "was not packed to the end; run the same tokenyard data pack again to go on"
        missing = "is no packed folder; make one by tokenyard data pack"
        unfinished = (folder / "journal.jsonl").exists()
        raise ConfigError(f"{str(folder)!r} {what if unfinished else missing}") from None
    try:
        manifest: dict[str, Any] = json.loads(text)
        stated = manifest.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CorruptError(f"{path} is not a manifest; pack the text again") from None
    if stated != manifest_digest(manifest):
        raise CorruptError(
            f"{path} was changed after packing; pack the text again, or copy the folder anew"
        )
    if manifest["format"] != FORMAT:
        raise ConfigError(
            f"{path} has format {manifest['format']}, and this tokenyard reads {FORMAT}; pack it again"
        )
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the digest that a manifest carries of itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    size = path.stat().st_size if path.exists() else -1
    if size != count * dtype.itemsize:
        has = "is missing" if size < 0 else f"has {size} bytes"
        raise CorruptError(
            f"{path} {has}, and {count * dtype.itemsize} were packed; copy the folder anew"
        )
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)


def _check_hash(path: Path, content: bytes, expected: str) -> None:
    if hashlib.sha256(content).hexdigest() != expected:
        raise CorruptError(
            f"{path} was changed after packing; pack the text again, or copy the file anew"
        )
