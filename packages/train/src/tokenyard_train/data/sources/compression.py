"""Open compressed files as streams. Damage and a missing end are errors in every format."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenyard_train.optional import require

Stream = io.BufferedReader | gzip.GzipFile
"""A file of bytes that has `peek` and `readline`."""

# A block of 128 KiB can be 4 bytes in the file, so this bounds the output of one piece to 64 MiB.
_PIECE = 2048  # bytes


def open_decompressed(file: Path, suffix: str) -> Stream:
    """Open a file as a stream of its decompressed bytes. `suffix` is its key in DECOMPRESSORS.

    Reading raises OSError, EOFError or the library's error if the file is damaged or cut off.
    """
    if suffix and not file.stat().st_size:
        raise EOFError("it is cut off: it has 0 bytes")
    return DECOMPRESSORS[suffix](file)


class _ZstdStream(io.RawIOBase):
    """The bytes of all frames of a zstd file.

    The library's own stream ends without an error where a file is cut off, and after one frame.
    """

    def __init__(self, file: Path):
        super().__init__()
        self._library: Any = require("zstandard", file.name, "tokenyard-train[data]")
        self._file = file.open("rb")
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(_PIECE)
            if not self._input:
                break
            self._decompress()
        if not self._output and self._frame is not None:
            raise EOFError("it is cut off: its last zstd frame has no end")
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        self._output = memoryview(self._frame.decompress(self._input))
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstd(file: Path) -> Stream:
    return io.BufferedReader(_ZstdStream(file), buffer_size=1 << 18)


DECOMPRESSORS: dict[str, Callable[[Path], Stream]] = {
    "": lambda file: file.open("rb"),
    ".gz": lambda file: gzip.GzipFile(file),
    ".zst": _open_zstd,
}
"""How to open a file, by the suffix of its compression."""
