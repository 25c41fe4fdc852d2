"""Where text comes from: documents in an order that does not depend on the machine or the time."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenyard import ConfigError

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_HELD_OUT_SHARE = 20  # one file of so many


class Document(NamedTuple):
    """One text."""

    name: str
    text: bytes  # UTF-8


def python_stdlib(held_out: bool) -> list[Document]:
    """Read the modules of the running Python's standard library, without its tests: one file in 20 is held out.

    Which ones depends on their path in the library only, so a module stays on its side from version to version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    library = sorted(name.as_posix() for name in names if not _NOT_LIBRARY & set(name.parts))
    documents = (Document(name, (root / name).read_bytes()) for name in library if _is_held_out(name) == held_out)
    return [document for document in documents if document.text and _is_utf8(document.text)]


def text_files(paths: str | Sequence[str], suffixes: Sequence[str]) -> list[Document]:
    """Read files, and the files of folders that have one of the suffixes, in the order of their names.

    Raises ConfigError for a path that is missing, holds no text, or is not UTF-8.
    """
    documents: list[Document] = []
    for path in map(Path, [paths] if isinstance(paths, str) else paths):
        files = _files(path, suffixes)
        documents += [Document(file.as_posix(), _read(file)) for file in files]
    return [document for document in documents if document.text]


def _files(path: Path, suffixes: Sequence[str]) -> Iterable[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"dataset.path {str(path)!r} does not exist; give a text file or a folder of them")
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
    if not files:
        ends = ", ".join(suffixes)
        raise ConfigError(
            f"dataset.path {str(path)!r} is a folder without files that end in {ends}; see dataset.suffixes"
        )
    return files


def _read(file: Path) -> bytes:
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"dataset.path: {file} cannot be read: {error.strerror}") from None
    if not _is_utf8(text):
        raise ConfigError(f"dataset.path: {file} is not UTF-8 text; convert it, or leave it out")
    return text


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % _HELD_OUT_SHARE == 0
