"""Load a TrainConfig from a YAML file and overrides.

OmegaConf parses and merges; pydantic validates.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenyard import BackendError, ConfigError, default_registry, started_processes
from tokenyard.bounded import read_text
from tokenyard_models.strict_config import parse, warn_ignored, without_ignored
from tokenyard_train.config.foundry import INSTEAD, INSTEAD_OF_VALUES, KNOWN, RENAMED
from tokenyard_train.config.from_hf import with_hf_model
from tokenyard_train.config.interpolate import interpolate
from tokenyard_train.config.replace import replace_renamed
from tokenyard_train.config.resolve import resolve
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.config.translate import Change, translate
from tokenyard_train.config.yaml_limits import check_yaml, references

log = logging.getLogger("tokenyard")

_MAX_BYTES = 1 << 20
_LOADER = re.compile(r"^(eval_loader|eval_loaders\.[^.]*)\.")
_STREAM = re.compile(r"^train_loader\.dataset\.streams\.[^.]*\.")


class _NoConfigError(ConfigError):
    """A file that cannot be a config."""

    def __init__(self, message: str):
        super().__init__(f"{message}; give the path of a YAML config")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a config file, apply ``section.key=value`` overrides, and resolve defaults.

    Raises ConfigError.
    """
    text = read_text(path, _MAX_BYTES, _NoConfigError)
    try:
        return read_config(_container(text, overrides))
    except ConfigError as error:
        given = f" with {' '.join(overrides)}" if overrides else ""
        raise ConfigError(f"{path}{given}: {error}") from None


def read_config(data: Mapping[str, Any], *, needs_tokenizer: bool = True) -> TrainConfig:
    """Validate a config given as a mapping, and resolve defaults. Raises ConfigError.

    A config whose model has a vocab_size may be read without its tokenizer.
    """
    ignored: list[str] = []
    changes: list[Change] = []
    kept = translated(data, changes, ignored, started_processes())
    kept = without_ignored(TrainConfig, with_hf_model(kept), "", ignored)
    kept = _without_keys_ignored_by_model(kept, ignored)
    warn_ignored(ignored)
    if told := [f"{change.key} as {change.note}" for change in changes if change.told]:
        log.warning("read as LLM Foundry means it: %s", "; ".join(told))
    return resolve(parse(TrainConfig, kept), needs_tokenizer)


def translated(
    data: Mapping[str, Any], changes: list[Change], ignored: list[str], processes: int
) -> dict[str, Any]:
    """Return a config in the keys of this package, see `translate`. Raises ConfigError."""
    # A top-level key without a value is absent, as in sections; an unknown one stays an error.
    known = TrainConfig.model_fields.keys() | RENAMED.keys() | KNOWN
    given = _rename_keys({k: v for k, v in data.items() if v is not None or k not in known})
    return _without_foundry_keys(translate(given, changes, ignored, processes))


def _container(text: str, overrides: Sequence[str]) -> dict[str, Any]:
    with _one_sentence("not a usable YAML config"):
        check_yaml(text, _MAX_BYTES)
        config = OmegaConf.create(text) if isinstance(yaml.safe_load(text), dict) else None
    if not isinstance(config, DictConfig) or not config:
        raise ConfigError("a config is a mapping of keys to values, and this is not one")
    for override in overrides:
        _override(config, override)
    with _one_sentence("not a usable YAML config"):
        container = dict(OmegaConf.to_container(config))  # type: ignore[arg-type]
        try:
            resolved = interpolate(container, _MAX_BYTES)
        except ConfigError as error:
            raise ConfigError(f"not a usable YAML config: {error}") from None
    return _with_variables(resolved, references(text))


def _with_variables(config: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """Move unknown top-level keys that others refer to below `variables`.

    `used` are the keys that ``${key}`` or an alias of YAML names.
    """
    known = TrainConfig.model_fields.keys() | RENAMED.keys() | KNOWN
    moved = {key: value for key, value in config.items() if key in used and key not in known}
    if not moved or not isinstance(config.get("variables", {}), dict | None):
        return config
    kept = {key: value for key, value in config.items() if key not in moved}
    return kept | {"variables": moved | (config.get("variables") or {})}


def _override(config: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not key.strip() or not equals:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, such as optimizer.lr=1e-3"
        )
    if "[" in key:
        name = key.partition("[")[0].strip()
        raise ConfigError(
            f"override {override!r} is of one item of a list; give the whole list, such as "
            f"{name}=[1,2]"
        )
    with _one_sentence(f"override {override!r} cannot be applied"):
        check_yaml(value, _MAX_BYTES)
        _refuse_comment(value)
        replace_renamed(config, key.strip(), value)
        config.merge_with_dotlist([override])


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn any error of the YAML and interpolation libraries into a one-line ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{what}: {error.problem}{line}") from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{what}: {key}{str(error).splitlines()[0]}") from None
    except (
        yaml.YAMLError,
        RecursionError,
        AttributeError,
        TypeError,
        ValueError,
        LookupError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{what}: {reason}") from None


def _refuse_comment(value: str) -> None:
    """Raise ConfigError for an override that YAML would cut at a #."""
    ends = (yaml.StreamEndEvent, yaml.DocumentEndEvent)
    events = yaml.parse(value, Loader=yaml.SafeLoader)
    marks = [event.end_mark for event in events if not isinstance(event, ends)]
    end = max(mark.index for mark in marks if mark is not None)
    if value[end:].strip():
        raise ConfigError(
            f"{value[end:].strip()!r} is a comment in YAML; put the value in quotes to keep it"
        )


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
