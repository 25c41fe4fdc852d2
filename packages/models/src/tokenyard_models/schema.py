"""Strict configuration: unknown keys are errors with a suggestion, and every error is one sentence naming its key."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenyard.errors import ConfigError, did_you_mean


class Strict(BaseModel):
    """A section of a config: immutable, and closed to keys that it does not declare."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Section = TypeVar("Section", bound=Strict)


def parse(section: type[Section], data: Mapping[str, Any], where: str = "") -> Section:
    """Validate `data` as a `section` that stands at key `where`; raises ConfigError, one sentence for each fault."""
    try:
        return section.model_validate(dict(data))
    except ValidationError as error:
        faults = [_sentence(section, where, fault) for fault in error.errors(include_url=False)]
        raise ConfigError("; ".join(dict.fromkeys(faults))) from None


def _sentence(section: type[Strict], where: str, fault: Any) -> str:
    location = [part for part in fault["loc"] if not _is_tag(part, fault)]
    key = ".".join(str(part) for part in ([where] if where else []) + location)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(section, location[:-1])
        return f"{key} is not a known key{did_you_mean(str(location[-1]), known)}; known are: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{key} is missing; every config needs it"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key or 'the config'} is {_shown(fault['input'])}: {message[0].lower() + message[1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_tag(part: Any, fault: Any) -> bool:
    """Pydantic puts a union member's tag or function name into the location; users did not write it."""
    return isinstance(part, str) and (part.startswith("function-") or "[" in part or part in fault.get("tags", ()))


def _known_keys(section: type[Strict], location: Sequence[Any]) -> list[str]:
    current: list[type[Strict]] = [section]
    for part in location:
        below = [_sections(s.model_fields[part].annotation) for s in current if part in s.model_fields]
        current = [s for found in below for s in found] or current
    return sorted({key for s in current for key in s.model_fields})


def _sections(annotation: Any) -> list[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType) or get_args(annotation):
        return [s for argument in get_args(annotation) for s in _sections(argument)]
    return []
