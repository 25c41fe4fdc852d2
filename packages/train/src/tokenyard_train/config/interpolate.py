"""Replace ``${key}`` in a config by the value of that key, with a bound on the result's size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenyard import ConfigError
from tokenyard.bounded import is_large

_REFERENCE = re.compile(r"(?P<escaped>\\)?\$\{(?P<key>[^{}]*)\}")
_PART = re.compile(r"[^.\[\]]+")
_RESOLVER = re.compile(r"\s*[A-Za-z_][\w.]*\s*:")

Path = tuple[str, ...]


class _Sized(NamedTuple):
    """A value, and the characters and items that it would take written out."""

    value: Any
    size: int


def interpolate(config: Mapping[str, Any], max_size: int) -> dict[str, Any]:
    """Return a config with all references replaced.

    ``${a.b}`` is the value at a key, ``${.b}`` one beside it, and a backslash before ``$`` keeps
    the text. Raises ConfigError for an unknown key, a cycle, a resolver such as ``oc.env``, and for
    more than `max_size` characters and items.
    """
    values: dict[str, Any] = _Interpolation(config, max_size).at(()).value
    return values


class _Interpolation:
    """Resolves each key once."""

    def __init__(self, config: Mapping[str, Any], max_size: int):
        self._config = _with_text_keys(config)
        self._max_size = max_size
        self._resolved: dict[Path, _Sized] = {}
        self._open: list[Path] = []  # keys that wait for the value of another

    def at(self, path: Path) -> _Sized:
        """Return the resolved value at a path."""
        if path in self._resolved:
            return self._resolved[path]
        if path in self._open:
            raise ConfigError(f"{_name(path)} refers to itself; write its value")
        self._open.append(path)
        resolved = self._resolve(self._raw(path), path)
        self._open.pop()
        if resolved.size > self._max_size:
            raise ConfigError(
                f"{_name(path) or 'it'} has more than {self._max_size:,} characters once each "
                "${...} is replaced; refer to less"
            )
        self._resolved[path] = resolved
        return resolved

    def _resolve(self, value: Any, path: Path) -> _Sized:
        if isinstance(value, Mapping):
            members = {key: self.at((*path, key)) for key in value}
            size = 1 + sum(len(key) + member.size for key, member in members.items())
            return _Sized({key: member.value for key, member in members.items()}, size)
        if isinstance(value, list):
            items = [self.at((*path, str(i))) for i in range(len(value))]
            return _Sized([item.value for item in items], 1 + sum(item.size for item in items))
        if isinstance(value, str):
            if "\0" in value:
                raise ConfigError(f"{_name(path)} has a NUL character; remove it")
            return self._text(value, path)
        if isinstance(value, int) and is_large(value):
            raise ConfigError(
                f"{_name(path)} is an integer of more than 64 bits; give a smaller one"
            )
        return _Sized(value, 1)

    def _text(self, text: str, path: Path) -> _Sized:
        whole = _REFERENCE.fullmatch(text)
        if whole is not None and not whole["escaped"]:
            return self._target(whole["key"], path)
        parts: list[str] = []
        end = 0
        for match in _REFERENCE.finditer(text):
            parts.append(text[end : match.start()])
            end = match.end()
            if match["escaped"]:
                parts.append(match[0][1:])
                continue
            target = self._target(match["key"], path)
            if isinstance(target.value, dict | list):
                raise ConfigError(
                    f"{_name(path)}: ${{{match['key']}}} is a section; within a text refer to a "
                    "single value"
                )
            parts.append(str(target.value))
            if sum(map(len, parts)) > self._max_size:
                break
        parts.append(text[end:])
        if "${" in _REFERENCE.sub("", text):
            raise ConfigError(
                f"{_name(path)}: {text[:60]!r} has a ${{ inside another or without its end; write "
                "${key}"
            )
        return _Sized("".join(parts), 1 + sum(map(len, parts)))

    def _target(self, key: str, path: Path) -> _Sized:
        if _RESOLVER.match(key):
            resolver = key.partition(":")[0].strip()
            raise ConfigError(
                f"{_name(path)}: the resolver {resolver} is not supported, so that no secret of "
                "the environment is saved with a run; write the value, or ${key} of another key"
            )
        dots = len(key.strip()) - len(key.strip().lstrip("."))
        base = path[:-dots] if dots else ()
        target = (*base, *_PART.findall(key.strip()))
        try:
            return self.at(target)
        except KeyError:
            raise ConfigError(f"{_name(path)}: Interpolation key {key!r} not found") from None

    def _raw(self, path: Path) -> Any:
        """Return the value at a path as written. Raises KeyError."""
        value: Any = self._config
        for depth, part in enumerate(path):
            if isinstance(value, str) and _REFERENCE.fullmatch(value):
                value = self.at(path[:depth]).value
            if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, Mapping):
                value = value[part]
            else:
                raise KeyError(part)
        return value


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(member) for key, member in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value


def _name(path: Path) -> str:
    return ".".join(path)
