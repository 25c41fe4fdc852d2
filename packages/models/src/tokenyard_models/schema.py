"""Strict configuration: unknown keys are errors with a suggestion, and every error is one sentence naming its key."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean

log = logging.getLogger("tokenyard")


class Strict(BaseModel):
    """A section of a config: immutable, and closed to keys that it does not declare.

    Keys in `ignored` are accepted, mean nothing here, and are named in a warning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()


def only(value: Any, feature: str) -> AfterValidator:
    """Return a validator for a key that asks for a feature that is not there: it may only say `value`."""

    def check(given: Any) -> Any:
        if given != value:
            raise ValueError(f"{feature} is not supported; leave the key out, or say {value}")
        return given

    return AfterValidator(check)


Section = TypeVar("Section", bound=Strict)


def parse(section: type[Section], data: Mapping[str, Any], where: str = "") -> Section:
    """Validate `data` as a `section` that stands at key `where`; raises ConfigError, one sentence for each fault."""
    ignored: list[str] = []
    kept = without_ignored(section, data, where, ignored)
    warn_ignored(ignored)
    try:
        return section.model_validate(kept)
    except ValidationError as error:
        faults = [_sentence(section, where, fault) for fault in error.errors(include_url=False)]
        raise ConfigError("; ".join(dict.fromkeys(faults))) from None


def without_ignored(section: type[Strict], data: Mapping[str, Any], where: str, ignored: list[str]) -> dict[str, Any]:
    """Return `data` without the keys that the section ignores, at any depth, and add those to the list."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key in section.ignored:
            ignored.append(path)
            continue
        below = _member(section, key, value)
        kept[key] = value if below is None else without_ignored(below, value, path, ignored)
    return kept


def warn_ignored(ignored: list[str]) -> None:
    """Name keys that mean nothing here in one warning, if there are any."""
    if ignored:
        log.warning("these keys mean nothing here and are ignored: %s", ", ".join(ignored))


def _sentence(section: type[Strict], where: str, fault: Any) -> str:
    path, owner = _resolve(section, fault["loc"])
    key = ".".join(([where] if where else []) + [str(part) for part in path])
    if fault["type"] == "extra_forbidden":
        known = sorted(owner.model_fields)
        return f"{key} is not a known key{did_you_mean(str(path[-1]), known)}; known are: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{key} is missing; it has no default"
    if fault["type"].startswith("union_tag"):
        return _tag_sentence(key, fault)
    message = fault["msg"].removeprefix("Value error, ")
    if not path and fault["type"] == "value_error":  # a rule over several keys, which its message names
        return message
    if fault["type"] != "value_error":  # pydantic's own begin with a capital
        message = message[0].lower() + message[1:]
    return f"{key or 'the config'} is {_shown(fault['input'])}: {message}"


def _tag_sentence(key: str, fault: Any) -> str:
    context = fault.get("ctx", {})
    name = context.get("discriminator", "name").strip("'")
    known = [tag.strip(" '") for tag in context.get("expected_tags", "").split(",") if tag]
    if "tag" not in context:
        return f"{key}.{name} is missing; it says which kind it is"
    tag, names = str(context["tag"]), ", ".join(known)
    return f"{key}.{name} {tag!r} is unknown{did_you_mean(tag, known)}; known are: {names}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _resolve(section: type[Strict], location: tuple[Any, ...]) -> tuple[list[Any], type[Strict]]:
    """Return the keys of a fault's location as the user wrote them, and the section that holds the last one.

    Pydantic puts names of union members between keys; those are skipped.
    """
    path: list[Any] = []
    owner, below = section, [section]
    for i, part in enumerate(location):
        holders = [s for s in below if part in s.model_fields]
        if holders:
            owner = holders[0]
            path.append(part)
            below = list(_sections(owner.model_fields[part].annotation))
        elif isinstance(part, int):
            path.append(part)
        elif tagged := [s for s in below if _tag(s) == part]:
            below = tagged
            owner = tagged[0]
        elif i == len(location) - 1 and below:
            owner = below[0]
            path.append(part)
    return path, owner


def _member(section: type[Strict], key: str, value: Any) -> type[Strict] | None:
    if key not in section.model_fields or not isinstance(value, Mapping):
        return None
    members = list(_sections(section.model_fields[key].annotation))
    tagged = [s for s in members if _tag(s) is not None and _tag(s) == value.get("name")]
    return next(iter(tagged or members), None)


def _tag(section: type[Strict]) -> Any:
    """Return the only value that the section's `name` can have, by which a union tells its members apart."""
    field = section.model_fields.get("name")
    values = get_args(field.annotation) if field is not None else ()
    return values[0] if len(values) == 1 else None


def _sections(annotation: Any) -> Iterator[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
