"""Read small files that others may have written: plain files of a bounded size and depth only."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from tokenyard.errors import ConfigError, TokenyardError

MAX_BYTES = 64 << 20
MAX_DEPTH = 40


class _NumberError(ValueError):
    """A number of JSON that is too large."""


def read_text(
    path: Path | str, max_bytes: int = MAX_BYTES, error: type[TokenyardError] = ConfigError
) -> str:
    """Return the UTF-8 text of a plain file, without a byte order mark.

    Raises `error`, one sentence that names the file, for anything else: a folder, a pipe, a device,
    a missing or unreadable file, a larger file, or other bytes than UTF-8.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path} is not a plain file; give the path of a file with text")
            content = file.read(min(found.st_size, max_bytes) + 1)
            if len(content) > found.st_size:  # what a file says of its own size may be wrong
                content += file.read(max_bytes + 1 - len(content))
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except ValueError as problem:  # a NUL in the path
        raise error(f"{str(path)!r} is not a path: {problem}") from None
    if len(content) > max_bytes:
        raise error(f"{path} has more than {max_bytes:,} bytes; at most {max_bytes:,} are read")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8 text") from None


def require_plain(path: Path | str, error: type[TokenyardError] = ConfigError) -> None:
    """Raise `error` if a path is something else than a plain file, such as a pipe or a device.

    Opening a pipe waits for its other end, and a device may have no end. A path that does not exist
    passes.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        raise error(f"{path} is not a plain file; delete it, or copy the file again")


def read_json(
    path: Path | str, max_bytes: int = MAX_BYTES, error: type[TokenyardError] = ConfigError
) -> dict[str, Any]:
    """Return the JSON object of a plain file. Raises `error`, see `read_text`."""
    text = read_text(path, max_bytes, error)
    try:
        content = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=_finite,
            object_pairs_hook=unique_keys,
        )
    except RecursionError:
        raise error(f"{path} is nested deeper than {MAX_DEPTH} levels") from None
    except _NumberError as problem:
        raise error(f"{path} has {problem}") from None
    except ValueError as problem:
        raise error(f"{path} is not JSON: {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{path} is not a JSON object but {type(content).__name__}")
    if is_deep(content):
        raise error(f"{path} is nested deeper than {MAX_DEPTH} levels")
    return content


def unique_keys(pairs: list[tuple[str, Any]], only: str | None = None) -> dict[str, Any]:
    """Return a JSON object of its pairs. Raises ValueError if a key has two different values.

    An `object_pairs_hook` of the `json` module, which takes the last value without it. With `only`,
    other keys may have two values.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if only in (None, key) and repr(content[key]) != repr(value):
                raise ValueError(f"it has the key {key!r} twice, with different values")
    return content


def is_deep(content: Any, max_depth: int = MAX_DEPTH) -> bool:
    """Return whether lists and mappings are nested deeper than `max_depth` levels."""
    level = [content]
    for _ in range(max_depth):
        level = [child for value in level for child in _children(value)]
        if not level:
            return False
    return any(isinstance(value, dict | list) for value in level)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def is_large(number: int) -> bool:
    """Return whether an integer has more than 64 bits: no size, id or count has."""
    return number.bit_length() > 64


def _whole(text: str) -> int:
    if len(text) > 21 or is_large(int(text)):
        raise _NumberError(f"an integer of more than 64 bits: {text[:21]}...")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _NumberError(f"a number beyond those of 64 bits: {text[:21]}")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
