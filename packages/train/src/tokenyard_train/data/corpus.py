"""The source of Python's standard library as a corpus: about 12 MB that every machine has."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

from tokenyard import ConfigError
from tokenyard_train.data.sources.files import list_files

_EXCLUDED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
)
_HELD_OUT_ONE_IN = 20  # files


class Document(NamedTuple):
    """A text and its name."""

    name: str
    text: bytes  # UTF-8


def python_stdlib(held_out: bool) -> list[Document]:
    """Read the standard library's modules, tests excluded: the held-out files or the others.

    One file in 20 is held out. The split depends only on a file's path in the library, so it is
    stable across Python versions. Raises ConfigError if the library is installed without source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = (
        path.relative_to(root).as_posix()
        for path in list_files(root, _EXCLUDED_FOLDERS)
        if path.suffix == ".py" and path.is_file()
    )
    documents = [
        Document(name, (root / name).read_bytes())
        for name in names
        if _is_held_out(name) == held_out
    ]
    kept = [document for document in documents if document.text and _is_utf8(document.text)]
    if not kept:
        raise ConfigError(
            f"name is 'python_stdlib', but {root} holds no source of the library; "
            "give files by 'text'"
        )
    return kept


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_held_out(name: str) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % _HELD_OUT_ONE_IN == 0
