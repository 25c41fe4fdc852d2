"""Load a TrainConfig from a YAML file and overrides."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenyard import BackendError, ConfigError, default_registry, started_processes
from tokenyard.bounded import read_text
from tokenyard_models.config_errors import without_secrets
from tokenyard_models.strict_config import parse, warn_ignored, without_ignored
from tokenyard_train.config.foundry import INSTEAD, INSTEAD_OF_VALUES, KNOWN, RENAMED, VARIABLES
from tokenyard_train.config.from_hf import with_hf_model
from tokenyard_train.config.read_yaml import MAX_BYTES, parse_yaml
from tokenyard_train.config.resolve import resolve
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.config.translate import Change, translate

log = logging.getLogger("tokenyard")

_LOADER = re.compile(r"^(eval_loader|eval_loaders\.[^.]*)\.")
_STREAM = re.compile(r"^train_loader\.dataset\.streams\.[^.]*\.")


class _NoConfigError(ConfigError):
    """A file that cannot be a config."""

    def __init__(self, message: str):
        super().__init__(f"{message}; give the path of a YAML config")


def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, planned: bool = False
) -> TrainConfig:
    """Read a config file, apply ``section.key=value`` overrides, and resolve defaults.

    With `planned`, the GPU may be one of another machine. Raises ConfigError.
    """
    text = read_text(path, MAX_BYTES, _NoConfigError)
    try:
        parsed = parse_yaml(text, overrides)
        return read_config(with_variables(parsed.resolved, parsed.referred), planned=planned)
    except ConfigError as error:
        given = f" with {without_secrets(' '.join(overrides))}" if overrides else ""
        raise ConfigError(f"{path}{given}: {error}") from None


def read_config(
    data: Mapping[str, Any], *, needs_tokenizer: bool = True, planned: bool = False
) -> TrainConfig:
    """Validate a config given as a mapping, and resolve defaults. Raises ConfigError.

    A config whose model has a vocab_size may be read without its tokenizer. With `planned`, the GPU
    may be one of another machine.
    """
    ignored: list[str] = []
    changes: list[Change] = []
    kept = with_hf_model(translated(data, changes, ignored, started_processes()))
    kept = known_keys(kept, ignored)
    warn_ignored(ignored)
    if told := [f"{change.key} as {change.note}" for change in changes if change.told]:
        log.warning("read as LLM Foundry means it: %s", "; ".join(told))
    return resolve(parse(TrainConfig, kept), needs_tokenizer, planned)


def translated(
    data: Mapping[str, Any], changes: list[Change], ignored: list[str], processes: int
) -> dict[str, Any]:
    """Return a config in the keys of this package, see `translate`. Raises ConfigError."""
    # A top-level key without a value is absent, as in sections; an unknown one stays an error.
    known = TrainConfig.model_fields.keys() | RENAMED.keys() | KNOWN | VARIABLES
    given = _rename_keys({k: v for k, v in data.items() if v is not None or k not in known})
    return _without_foundry_keys(translate(given, changes, ignored, processes))


def known_keys(data: Mapping[str, Any], ignored: list[str]) -> dict[str, Any]:
    """Return a config without the keys that have no meaning here; append them to `ignored`."""
    kept = without_ignored(TrainConfig, data, "", ignored)
    return _without_keys_ignored_by_model(kept, ignored)


def with_variables(config: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """Move unknown top-level keys that others refer to below `variables`.

    `used` are the keys that ``${key}`` or an alias of YAML names.
    """
    known = TrainConfig.model_fields.keys() | RENAMED.keys() | KNOWN
    moved = {key: value for key, value in config.items() if key in used and key not in known}
    if not moved or not isinstance(config.get("variables", {}), dict | None):
        return config
    kept = {key: value for key, value in config.items() if key not in moved}
    return kept | {"variables": moved | (config.get("variables") or {})}


def _rename_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replace Composer's keys by ours. Raises ConfigError if both are set and differ."""
    renamed = dict(data)
    for composer_key, key in RENAMED.items():
        if composer_key not in renamed:
            continue
        value = renamed.pop(composer_key)
        if key in renamed and renamed[key] != value:
            raise ConfigError(
                f"{composer_key} is {value!r} and {key} is {renamed[key]!r}; "
                "they mean the same, set one"
            )
        renamed[key] = value
    return renamed


def _without_foundry_keys(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config without the keys of LLM Foundry that are unknown here and have no value.

    Raises ConfigError for such a key with a value, and for a value that is something else here.
    """
    kept: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{prefix}{key}"
        known_as = _STREAM.sub("train_loader.dataset.", _LOADER.sub("train_loader.", path))
        instead = INSTEAD.get(known_as)
        if instead is not None and value in (None, ""):
            continue
        if instead is not None:
            raise ConfigError(f"{path} is a key of LLM Foundry that is not known here; {instead}")
        values = INSTEAD_OF_VALUES.get(known_as, {})
        if isinstance(value, str) and value in values:
            raise ConfigError(f"{path} is {value!r}, a name of LLM Foundry; {values[value]}")
        nested = isinstance(value, Mapping) and path != "variables"
        kept[key] = _without_foundry_keys(value, f"{path}.") if nested else value
    return kept


def _without_keys_ignored_by_model(data: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    """Drop the keys that the model's schema ignores, and append them to `ignored`."""
    model = data.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
        return data
    try:
        definition = default_registry().choose("model", model["name"]).backend.load()
    except BackendError:  # build_model reports an unknown model
        return data
    schema = getattr(definition, "schema", None)
    if schema is None:
        return data
    name = {"name": model["name"]}
    rest = {key: value for key, value in model.items() if key != "name"}
    return data | {"model": name | without_ignored(schema, rest, "model", ignored)}
