"""The text of Python's standard library: some megabytes that every machine has."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

from tokenyard import ConfigError
from tokenyard_train.data.sources.files import list_files

_NOT_LIBRARY = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
)
_HELD_OUT_SHARE = 20  # one file of so many


class Document(NamedTuple):
    """One text."""

    name: str
    text: bytes  # UTF-8


def python_stdlib(held_out: bool) -> list[Document]:
    """Read the modules of the running Python's standard library, without its tests: one file in 20 is held out.

    Which ones depends on their path in the library only, so a module stays on its side from version to version. Raises
    ConfigError where the library is installed without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    library = (
        path.relative_to(root).as_posix() for path in list_files(root, (".py",), _NOT_LIBRARY)
    )
    documents = [
        Document(name, (root / name).read_bytes())
        for name in library
        if _is_held_out(name) == held_out
    ]
    kept = [document for document in documents if document.text and _is_utf8(document.text)]
    if not kept:
        raise ConfigError(
            f"name is 'python_stdlib', but {root} holds no source of the library; give files by 'text'"
        )
    return kept


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_held_out(name: str) -> bool:
    return (
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % _HELD_OUT_SHARE
        == 0
    )
