"""Write a config of LLM Foundry in the keys of this package, with a comment for each change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tokenyard import ConfigError
from tokenyard.bounded import read_text
from tokenyard_models.strict_config import parse
from tokenyard_train.config.load import known_keys, translated, with_variables
from tokenyard_train.config.read_yaml import MAX_BYTES, ParsedYaml, parse_yaml
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.config.translate import Change

_NO_MEANING = "left out; it has no meaning here"
_NO_VALUE = "left out; it has no value"
_ABSENT = object()


def migrated(path: Path | str, overrides: Sequence[str] = (), processes: int = 8) -> str:
    """Return the YAML of a config for a run of `processes`, in the keys of this package.

    A comment above a section names each of its keys that changed. Raises ConfigError for what has
    no counterpart.
    """
    try:
        parsed = parse_yaml(read_text(path, MAX_BYTES), overrides)
        return _migrated(parsed, processes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _migrated(parsed: ParsedYaml, processes: int) -> str:
    changes: list[Change] = []
    ignored: list[str] = []
    given = with_variables(parsed.resolved, parsed.referred)
    moved = parsed.resolved.keys() - given.keys()
    kept = known_keys(translated(given, changes, ignored, processes), ignored)
    parse(TrainConfig, kept)
    changes += [Change(key, _NO_MEANING) for key in ignored]
    changes += [Change(key, f"variables.{key}") for key in sorted(moved)]
    changes += _without_value(parsed.resolved, kept, changes)
    written = _restored(kept, parsed.resolved, parsed.written)
    lines: list[str] = []
    for key in dict.fromkeys([*parsed.written, *written]):
        lines += _comments(key, changes, parsed.written)
        if key in written:
            lines += _lines({key: written[key]}, "")
    text = "\n".join(lines) + "\n"
    for key in moved:
        text = re.sub(rf"\$\{{\s*{re.escape(key)}(?=[.}}\[\s])", f"${{variables.{key}", text)
    return text


def _without_value(
    given: Mapping[str, Any], kept: Any, changes: Sequence[Change], prefix: str = ""
) -> Iterator[Change]:
    """Yield the keys without a value that are left out and that no other change names."""
    named = {change.key for change in changes}
    for key, value in given.items():
        path = f"{prefix}{key}"
        if path in named or (key in _members(kept) and not isinstance(value, Mapping)):
            continue
        if value is None or (value == {} and key not in _members(kept)):
            yield Change(path, _NO_VALUE)
        elif isinstance(value, Mapping):
            yield from _without_value(value, _members(kept).get(key), changes, f"{path}.")


def _restored(value: Any, resolved: Any, written: Any) -> Any:
    """Return a value with ``${key}`` where that was written and the value is still the same."""
    if isinstance(value, Mapping):
        parts = (_members(resolved), _members(written))
        return {
            key: _restored(member, *(part.get(key, _ABSENT) for part in parts))
            for key, member in value.items()
        }
    return written if value == resolved and written is not _ABSENT else value


def _members(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _comments(section: str, changes: Sequence[Change], written: Mapping[str, Any]) -> Iterator[str]:
    """Yield the comments on the keys of a top-level section."""
    for change in changes:
        if change.key.partition(".")[0] != section:
            continue
        value = _at(written, change.key)
        shown = "not set" if value is _ABSENT else _scalar(value)
        if len(shown) > 40:
            shown = "..."
        yield f"# {change.key}: {shown} -> {' '.join(change.note.split())}"


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = _members(value).get(part, _ABSENT)
    return value


def _lines(section: Mapping[str, Any], indent: str) -> Iterator[str]:
    """Yield the lines of a mapping in YAML."""
    for key, value in section.items():
        name = _scalar(key)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()
