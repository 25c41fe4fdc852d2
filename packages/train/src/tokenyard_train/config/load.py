"""Load a TrainConfig from a YAML file and overrides.

OmegaConf parses and merges; pydantic validates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenyard import BackendError, ConfigError, default_registry
from tokenyard.bounded import read_text
from tokenyard_models.strict_config import parse, warn_ignored, without_ignored
from tokenyard_train.config.foundry import INSTEAD, INSTEAD_OF_VALUES, RENAMED
from tokenyard_train.config.from_hf import with_hf_model
from tokenyard_train.config.interpolate import interpolate
from tokenyard_train.config.replace import replace_renamed
from tokenyard_train.config.resolve import resolve
from tokenyard_train.config.schema import TrainConfig

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 40
_SAME_KEYS = re.compile(r"^(train|eval)_loader\.dataset\.(streams\.[^.]*\.)?")
_BASE_8 = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*")
_BASE_60 = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")


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
    # A top-level key without a value is absent, as in sections; an unknown one stays an error.
    known = TrainConfig.model_fields.keys() | RENAMED.keys()
    given = _rename_keys({k: v for k, v in data.items() if v is not None or k not in known})
    kept = without_ignored(TrainConfig, with_hf_model(given), "", ignored)
    kept = _without_keys_ignored_by_model(kept, ignored)
    warn_ignored(ignored)
    return resolve(parse(TrainConfig, _without_foundry_keys(kept)), needs_tokenizer)


def _container(text: str, overrides: Sequence[str]) -> dict[str, Any]:
    with _one_sentence("not a usable YAML config"):
        _refuse_aliases_and_depth(text)
        config = OmegaConf.create(text) if isinstance(yaml.safe_load(text), dict) else None
    if not isinstance(config, DictConfig) or not config:
        raise ConfigError("a config is a mapping of keys to values, and this is not one")
    for override in overrides:
        _override(config, override)
    with _one_sentence("not a usable YAML config"):
        container = dict(OmegaConf.to_container(config))  # type: ignore[arg-type]
        try:
            return interpolate(container, _MAX_BYTES)
        except ConfigError as error:
            raise ConfigError(f"not a usable YAML config: {error}") from None


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
        _refuse_aliases_and_depth(value)
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


def _refuse_aliases_and_depth(text: str) -> None:
    """Raise ConfigError for aliases, and for nesting that could exhaust the stack.

    Nested aliases expand exponentially, and interpolation replaces them.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > _MAX_DEPTH:
            raise ConfigError(f"it is nested deeper than {_MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            _refuse_other_bases(event.value)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"the YAML alias *{event.anchor} is not supported; write ${{key}} instead"
            )


def _refuse_other_bases(text: str) -> None:
    """Raise ConfigError for a number that YAML reads in a base that it does not show."""
    for base, pattern in ((8, _BASE_8), (60, _BASE_60)):
        if pattern.fullmatch(text):
            raise ConfigError(
                f"{text} is a number of base {base} in YAML; "
                "write the number in base 10, or text in quotes"
            )


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
        known_as = _SAME_KEYS.sub("train_loader.dataset.", path)
        known_as = known_as.replace("eval_loader.", "train_loader.", 1)
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
