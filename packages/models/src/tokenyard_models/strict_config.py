"""Parse config sections strictly: an unknown key is an error with a suggestion.

Every error is one sentence that names its key.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from tokenyard import ConfigError
from tokenyard_models.config_errors import sections, sentences, tag_of

log = logging.getLogger("tokenyard")

HOUSEKEEPING = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
"""Keys of a published config.json that do not change what a model computes."""


# Products of a few such numbers stay within float32.
_SMALLEST = 1e-30
_LARGEST = 1e30


class Strict(BaseModel):
    """A config section: immutable, without keys that it does not declare.

    Keys in `ignored` are accepted, have no effect, and are named in a warning.
    """

    # Defaults are converted as values are: `1` for a float becomes 1.0, which JSON tells apart.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )
    ignored: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def habits(cls, where: str) -> Mapping[str, str]:
        """Return what to write at key `where`, by the keys that other programs have for it.

        The error of an unknown key names it. It counts for the sections below this one, too.
        """
        return {}


def _types(annotation: Any) -> frozenset[type]:
    """Return the types in a union, those of its literals too."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return frozenset(type(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return frozenset().union(*map(_types, get_args(annotation)))
    return frozenset([annotation] if isinstance(annotation, type) else [])


def only(supported: Any, feature: str) -> AfterValidator:
    """Return a validator for the key of an unsupported feature; it accepts only `supported`."""

    def check(value: Any) -> Any:
        if value != supported:
            shown = json.dumps(supported)  # JSON is how YAML writes it too
            raise ValueError(f"{feature} is not supported; say {shown}, where the weights allow it")
        return value

    return AfterValidator(check)


Section = TypeVar("Section", bound=Strict)


def parse(section: type[Section], data: Mapping[str, Any], where: str = "") -> Section:
    """Validate `data` as a `section` at key `where`.

    Raises ConfigError with one sentence for each wrong key.
    """
    ignored: list[str] = []
    kept = without_ignored(section, data, where, ignored)
    warn_ignored(ignored)
    try:
        parsed = section.model_validate(kept)
    except ValidationError as error:
        raise ConfigError(sentences(section, where, error, section.habits(where))) from None
    _check_range(parsed, where)
    return parsed


def without_ignored(
    section: type[Strict], data: Mapping[str, Any], where: str, ignored: list[str]
) -> dict[str, Any]:
    """Return `data` without the keys that the section ignores, at any depth.

    Appends the paths of those keys to `ignored`. Raises ConfigError for a value that pydantic would
    convert to a number.
    """
    kept: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key in section.ignored:
            ignored.append(path)
            continue
        _refuse_converted(section, key, value, path)
        member = member_section(section, key, value)
        kept[key] = value if member is None else without_ignored(member, value, path, ignored)
    return kept


def _refuse_converted(section: type[Strict], key: str, value: Any, path: str) -> None:
    """Raise ConfigError for a boolean, text or 8.0 where a number is meant."""
    if key not in section.model_fields:
        return
    types = _types(section.model_fields[key].annotation)
    convertible = (bool, float, str) if float not in types else (bool, str)
    if types & {int, float} and isinstance(value, convertible) and type(value) not in types:
        meant = "a number" if float in types else "a whole number"
        raise ConfigError(f"{path} is {value!r}; give {meant}")


def _check_range(value: Any, path: str) -> None:
    """Raise ConfigError for a number of a section, at any depth, that float32 cannot use."""
    if isinstance(value, float) and value and not _SMALLEST <= abs(value) <= _LARGEST:
        raise ConfigError(
            f"{path} is {value!r}; give 0, or a number from {_SMALLEST:g} to {_LARGEST:g} in size"
        )
    members: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Strict):
        members = value
    elif isinstance(value, Mapping):
        members = value.items()
    elif isinstance(value, list) or type(value) is tuple:  # a Span has a rule of its own
        members = enumerate(value)
    for key, member in members:
        _check_range(member, f"{path}.{key}".lstrip("."))


def warn_ignored(ignored: list[str]) -> None:
    """Log one warning that names the ignored keys, if there are any."""
    if ignored:
        log.warning("these keys mean nothing here and are ignored: %s", ", ".join(ignored))


def merged(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `defaults` updated by `overrides`, section by section."""
    result = dict(defaults)
    for key, value in overrides.items():
        default = result.get(key)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            result[key] = merged(default, value)
        else:
            result[key] = value
    return result


def member_section(section: type[Strict], key: str, value: Any) -> type[Strict] | None:
    """Return the section that a value of a key is, or None if it is not one."""
    if key not in section.model_fields or not isinstance(value, Mapping):
        return None
    members = [s for s in sections(section.model_fields[key].annotation) if issubclass(s, Strict)]
    tagged = [s for s in members if tag_of(s) is not None and tag_of(s) == value.get("name")]
    return next(iter(tagged or members), None)
