"""Strict configuration: unknown keys are errors with a suggestion, and every error is one sentence naming its key."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

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
"""Keys of a published config.json that say nothing of what a model computes."""


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
            said = json.dumps(value)  # as YAML has it, too
            raise ValueError(f"{feature} is not supported; say {said}, where the weights allow it")
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
        raise ConfigError(sentences(section, where, error)) from None


def without_ignored(
    section: type[Strict], data: Mapping[str, Any], where: str, ignored: list[str]
) -> dict[str, Any]:
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


def _member(section: type[Strict], key: str, value: Any) -> type[Strict] | None:
    if key not in section.model_fields or not isinstance(value, Mapping):
        return None
    members = [s for s in sections(section.model_fields[key].annotation) if issubclass(s, Strict)]
    tagged = [s for s in members if tag_of(s) is not None and tag_of(s) == value.get("name")]
    return next(iter(tagged or members), None)
