"""Cubins on disk, so that another process need not compile what one has compiled.

An entry is a file named by a digest of all that decides what is in it. It begins with the digest of its content, so
that a damaged one is noticed and made again; it is written beside and renamed, so that no process sees half of one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from tokenyard import cache_folder
from tokenyard_kernels_cuda.toolchain._compile import compile_cubin, compiler_version, options_for
from tokenyard_kernels_cuda.toolchain._source import Source, headers

log = logging.getLogger("tokenyard")
_DIGEST = hashlib.sha256().digest_size
_warned: set[Path] = set()


def cubin_folder() -> Path:
    """Return where the entries lie."""
    return cache_folder() / "cubins"


def cubin_of(source: Source, architecture: str) -> bytes:
    """Return a source's cubin, from disk if it is there and whole. Raises CompileError.

    Where the folder cannot be written, a warning says so once, and each process compiles for itself.
    """
    path = cubin_folder() / f"{_key(source, architecture)}.cubin"
    cubin = _read(path)
    if cubin is None:
        cubin = compile_cubin(source, architecture)
        _write(path, cubin)
    return cubin


def _key(source: Source, architecture: str) -> str:
    parts = [compiler_version(), source.name, source.text(), *options_for(source, architecture)]
    for name, text in sorted(headers().items()):
        parts += [name, text]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:_DIGEST], content[_DIGEST:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".unfinished-", delete=False
        ) as file:
            try:
                file.write(hashlib.sha256(cubin).digest() + cubin)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        if path.parent not in _warned:
            _warned.add(path.parent)
            fault = f"compiled kernels cannot be kept in {path.parent} ({error})"
            log.warning("%s; each process compiles them anew", fault)
