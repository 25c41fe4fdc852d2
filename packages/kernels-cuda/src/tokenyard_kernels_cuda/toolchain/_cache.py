"""Cache of cubins on disk, shared by all processes.

An entry is a file named by a digest of everything that determines its content. It starts with the
digest of the cubin, so that a corrupt entry is detected and recompiled. It is written to a
temporary file and renamed, so that no process reads a partial entry.
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
    """Return the folder of the cache."""
    return cache_folder() / "cubins"


def cubin_of(source: Source, architecture: str) -> bytes:
    """Return the cubin of a source, from the cache or from NVRTC. Raises CompileError.

    If the folder is not writable, the first call warns, and each process compiles for itself.
    """
    path = cubin_folder() / f"{_key(source, architecture)}.cubin"
    cubin = _read(path)
    if cubin is None:
        cubin = compile_cubin(source, architecture)
        _write(path, cubin)
    return cubin


def _key(source: Source, architecture: str) -> str:
    """Return the name of an entry: NVRTC's version, the source, the options and all headers."""
    parts = [compiler_version(), source.name, source.text(), *options_for(source, architecture)]
    for name, text in sorted(headers().items()):
        parts += [name, text]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """Return the cubin of an entry, or None if the entry is missing or corrupt."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest = content[:_DIGEST]
    cubin = content[_DIGEST:]
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
            log.warning(
                "compiled kernels cannot be kept in %s (%s); each process compiles them anew",
                path.parent,
                error,
            )
