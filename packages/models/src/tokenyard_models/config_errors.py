"""Turn pydantic's errors into sentences: the key, the value, and what would work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tokenyard.errors import did_you_mean, unknown

_SECRET = re.compile(r"(://[^/@\s:]*:)[^/\s]*(?=@)|(://[^?\s'\"]*\?)[^\s'\"}]*")
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}
"""The expected value, by the first word of pydantic's error type."""

_MOST_LISTED = 12  # keys beside a suggestion

_LIMITS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def sentences(
    section: type[BaseModel], where: str, error: ValidationError, habits: Mapping[str, str]
) -> str:
    """Return one sentence for each wrong key of a `section` at key `where`.

    `habits` says what to write for a key that other programs have.
    """
    located = [
        (*_locate(section, where, fault["loc"]), fault) for fault in error.errors(include_url=False)
    ]
    by_key = groupby(located, key=lambda entry: entry[0])
    return "; ".join(
        _sentence(key, [(owner, fault) for _, owner, fault in group], habits)
        for key, group in by_key
    )


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """List the sections that a value of this type can be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections(argument)


def tag_of(section: type[BaseModel]) -> Any:
    """Return the only value of the section's `name`, which selects a member of a union, or None."""
    field = section.model_fields.get("name")
    values = get_args(field.annotation) if field is not None else ()
    return values[0] if len(values) == 1 else None


def _sentence(
    key: str, faults: list[tuple[type[BaseModel], Any]], habits: Mapping[str, str]
) -> str:
    """Return the sentence for one key, whose faults are (section that holds it, pydantic error)."""
    owner, fault = faults[0]
    kind = fault["type"]
    if kind == "extra_forbidden":
        last = key.rpartition(".")[2]
        if last in habits:
            return f"{key} is not a known key; write {habits[last]}"
        return _unknown_key(key, sorted(owner.model_fields))
    if kind == "missing":
        return f"{key} is missing; it has no default"
    if kind.startswith("union_tag"):
        return _unknown_tag(key, fault["ctx"])
    value = fault["input"]
    if kind == "value_error":
        message: str = fault["msg"].removeprefix("Value error, ")
        # A rule over several keys has no location and names its keys itself.
        return f"{key} is {_shortened(value)}: {message}" if fault["loc"] else message
    expected = dict.fromkeys(_expected(each) for _, each in faults)
    names = [
        name
        for _, each in faults
        if each["type"] == "literal_error"
        for name in _quoted(each["ctx"])
    ]
    return f"{key} is {_shortened(value)}{_nearest(value, names)}; give {' or '.join(expected)}"


def _unknown_key(key: str, known: list[str]) -> str:
    """Return the sentence for an unknown key: the nearest known one, and all if they are few."""
    near = did_you_mean(key.rpartition(".")[2], known)
    choices = "" if near and len(known) > _MOST_LISTED else f"; known are: {', '.join(known)}"
    return f"{key} is not a known key{near}{choices}"


def _expected(fault: Mapping[str, Any]) -> str:
    kind = fault["type"]
    context = fault.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind in _LIMITS:
        return f"a number {_LIMITS[kind]} {_plain(next(iter(context.values())))}"
    message = fault["msg"]
    return _EXPECTED.get(kind.split("_")[0], f"something else: {message[0].lower()}{message[1:]}")


def _plain(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _unknown_tag(key: str, context: Mapping[str, Any]) -> str:
    name = context["discriminator"].strip("'")
    if "tag" not in context:
        return f"{key}.{name} is missing; it says which kind it is"
    tag = str(context["tag"])
    known = [each.strip(" '") for each in context["expected_tags"].split(",")]
    return unknown(f"{key}.{name}", tag, known)


def _quoted(context: Mapping[str, Any]) -> list[str]:
    return [part for part in context["expected"].split("'") if part.isidentifier()]


def _nearest(value: Any, names: Iterable[str]) -> str:
    return did_you_mean(value, names) if isinstance(value, str) else ""


def without_secrets(text: str) -> str:
    """Return a text with ``***`` for the passwords and the queries of its URIs."""
    return _SECRET.sub(r"\1\2***", text)


def _shortened(value: Any) -> str:
    """Return a value as an error shows it, without secrets of a URI."""
    text = without_secrets(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _locate(
    section: type[BaseModel], where: str, location: tuple[Any, ...]
) -> tuple[str, type[BaseModel]]:
    """Return a fault's key as the user wrote it, and the section that holds its last part.

    Pydantic puts names of union members between keys; the key leaves them out.
    """
    path: list[Any] = [where] if where else []
    owner = section
    candidates = [section]
    for i, part in enumerate(location):
        holders = [s for s in candidates if part in s.model_fields]
        if holders:
            owner = holders[0]
            path.append(part)
            candidates = list(sections(owner.model_fields[part].annotation))
        elif isinstance(part, int):
            path.append(part)
        elif tagged := [s for s in candidates if tag_of(s) == part]:
            owner = tagged[0]
            candidates = tagged
        elif i == len(location) - 1 and candidates:
            owner = candidates[0]
            path.append(part)
    return ".".join(map(str, path)) or "the config", owner
