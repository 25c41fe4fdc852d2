"""Parse the YAML of a config, apply overrides, and replace ``${key}``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenyard import ConfigError
from tokenyard_train.config.interpolate import interpolate
from tokenyard_train.config.replace import replace_sections
from tokenyard_train.config.yaml_limits import check_yaml, references

MAX_BYTES = 1 << 20


class ParsedYaml(NamedTuple):
    """A config as a mapping."""

    written: dict[str, Any]  # with ${key} as it is written
    resolved: dict[str, Any]
    referred: set[str]  # top-level keys that ${key} or an alias of YAML names


def parse_yaml(text: str, overrides: Sequence[str] = ()) -> ParsedYaml:
    """Parse a config. Raises ConfigError, in one sentence, for text that is none."""
    with _one_sentence("not a usable YAML config"):
        check_yaml(text, MAX_BYTES)
        config = OmegaConf.create(text) if isinstance(yaml.safe_load(text), dict) else None
    if not isinstance(config, DictConfig) or not config:
        raise ConfigError("a config is a mapping of keys to values, and this is not one")
    for override in overrides:
        _override(config, override)
    with _one_sentence("not a usable YAML config"):
        written = dict(OmegaConf.to_container(config))  # type: ignore[arg-type]
        try:
            resolved = interpolate(written, MAX_BYTES)
        except ConfigError as error:
            raise ConfigError(f"not a usable YAML config: {error}") from None
    return ParsedYaml(written, resolved, references(text))


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
        check_yaml(value, MAX_BYTES)
        _refuse_comment(value)
        replace_sections(config, key.strip(), value)
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
        problem = error.problem
        if problem == "but found another document":
            problem = "a file has one document, and another begins"
        raise ConfigError(f"{what}: {problem}{line}") from None
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
