"""Decode token ids as MDS columns store them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenyard import ConfigError
from tokenyard_train.data.tokens import CorruptError, Ids

_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_SHAPE_BYTES = (1, 2, 4, 8)  # widths of a stored length; a value's first byte holds the position


@dataclass(frozen=True)
class TokensFormat:
    """How ids are stored in a column.

    A value of `ndarray:<dtype>` starts with a byte ``1 << 2 | position of width``, and the length
    in that width.
    """

    dtype: np.dtype[Any]
    has_length: bool  # the values start with their length

    def length(self, size: int, path: Path) -> int:
        """Return the ids of a value of `size` bytes. Raises CorruptError if no ids fit."""
        for header in self._headers():
            length, rest = divmod(size - header, self.dtype.itemsize)
            if not rest and length > 0 and header == self._header(length):
                return length
        raise CorruptError(
            f"{path} holds a sample of {size} bytes, which is no number of {self.dtype.name}; "
            "see token_encoding_type"
        )

    def ids(self, value: memoryview, path: Path) -> Ids:
        """Return the ids of a value in their stored dtype."""
        length = self.length(len(value), path)
        header = self._header(length)
        if header:
            width = _SHAPE_BYTES.index(header - 1)
            stored = bytes([1 << 2 | width]) + length.to_bytes(header - 1, "little")
            if bytes(value[:header]) != stored:
                raise CorruptError(f"{path} holds an array that is no list of ids; copy it again")
        return np.frombuffer(value[header:], dtype=self.dtype)

    def _headers(self) -> tuple[int, ...]:
        return tuple(1 + width for width in _SHAPE_BYTES) if self.has_length else (0,)

    def _header(self, length: int) -> int:
        """Return the bytes before the ids."""
        if not self.has_length:
            return 0
        return 1 + next(width for width in _SHAPE_BYTES if length < 1 << (8 * width))


class WideIds:
    """Tells whether ids were read in a narrower dtype than they were written in.

    The upper half of each id in memory is then an id of its own: 0, or as large as the vocabulary
    allows.
    """

    def __init__(self, vocab_size: int):
        self._last = vocab_size - 1
        self._upper = True  # each second id may be an upper half
        self._lower = False  # some other id may not

    def add(self, ids: Ids) -> None:
        """Add the ids of a sample."""
        bits = 8 * ids.dtype.itemsize
        most = self._last >> bits
        self._upper &= bits < 64 and len(ids) % 2 == 0 and int(ids[1::2].max(initial=0)) <= most
        self._lower |= int(ids[::2].max(initial=0)) > most

    def __bool__(self) -> bool:
        return self._upper and self._lower


def tokens_format(encoding: str, encoding_type: str, key: str) -> TokensFormat:
    """Return the format of a column's encoding. Raises ConfigError if it is not read.

    `ndarray:<dtype>` and `ndarray:<dtype>:<length>` name their dtype; `bytes` are of
    `encoding_type`.
    """
    kind, *rest = encoding.split(":")
    if encoding == "bytes":
        rest = [encoding_type, ""]
    known = kind in ("bytes", "ndarray") and len(rest) in (1, 2) and rest[0] in _DTYPES
    if not known or not (len(rest) == 1 or rest[1].isdecimal() or encoding == "bytes"):
        raise ConfigError(
            f"{key}: column 'tokens' is {encoding}; bytes (of token_encoding_type), "
            "ndarray:<integers> and ndarray:<integers>:<length> are read"
        )
    return TokensFormat(np.dtype(rest[0]).newbyteorder("<"), has_length=len(rest) == 1)
