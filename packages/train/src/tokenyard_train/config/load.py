"""From a YAML file and overrides to a TrainConfig: OmegaConf reads and interpolates, pydantic checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenyard import BackendError, ConfigError, default_registry
from tokenyard_models.schema import parse, warn_ignored, without_ignored
from tokenyard_train.config.foundry import INSTEAD, RENAMED
from tokenyard_train.config.from_hf import with_published_model
from tokenyard_train.config.resolve import resolve
from tokenyard_train.config.schema import TrainConfig

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 40


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a config file, with ``key.below=value`` overrides, and fill in what it leaves open. Raises ConfigError."""
    text = _read(Path(path))
    try:
        return read_config(_container(text, overrides))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_config(data: Mapping[str, Any]) -> TrainConfig:
    """Check a config that is already a mapping, and fill in what it leaves open. Raises ConfigError."""
    ignored: list[str] = []
    kept = without_ignored(TrainConfig, with_published_model(_renamed(data)), "", ignored)
    kept = _without_ignored_by_model(kept, ignored)
    warn_ignored(ignored)
    _refuse_foundry_s(kept)
    return resolve(parse(TrainConfig, kept))


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(
                f"{path} has {path.stat().st_size} bytes; a config has at most {_MAX_BYTES}"
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; give the path of a YAML config") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; give the path of a YAML config"
        ) from None


def _container(text: str, overrides: Sequence[str]) -> dict[str, Any]:
    with _one_sentence("not a usable YAML config"):
        _refuse_aliases_and_depth(text)
        config = OmegaConf.create(text)
    if not isinstance(config, DictConfig) or not config:
        raise ConfigError("a config is a mapping of keys to values, and this is none")
    for override in overrides:
        _override(config, override)
    with _one_sentence("not a usable YAML config"):
        container = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in dict(container).items()}  # type: ignore[arg-type]


def _override(config: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not key.strip() or not equals:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, such as optimizer.lr=1e-3"
        )
    with _one_sentence(f"override {override!r} cannot be applied"):
        _refuse_aliases_and_depth(value)
        config.merge_with_dotlist([override])


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn whatever the YAML and interpolation libraries raise into a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{what}: {error.problem}{place}") from None
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
        raise ConfigError(
            f"{what}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None


def _refuse_aliases_and_depth(text: str) -> None:
    """Aliases of aliases grow without bound, and interpolation does their work; nesting must fit the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > _MAX_DEPTH:
            raise ConfigError(f"it is nested deeper than {_MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                f"the YAML alias *{event.anchor} is not supported; write ${{key}} instead"
            )


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Put our key in place of another name for it. Raises ConfigError if both are given and disagree."""
    renamed = dict(data)
    for theirs, ours in RENAMED.items():
        if theirs not in renamed:
            continue
        value = renamed.pop(theirs)
        if ours in renamed and renamed[ours] != value:
            raise ConfigError(
                f"{theirs} is {value!r} and {ours} is {renamed[ours]!r}; they mean the same, set one"
            )
        renamed[ours] = value
    return renamed


def _refuse_foundry_s(data: Mapping[str, Any], where: str = "") -> None:
    """Name our key for one that LLM Foundry's users know by another name."""
    for key, value in data.items():
        path = f"{where}{key}"
        if (instead := INSTEAD.get(path.replace("eval_loader.", "train_loader.", 1))) is not None:
            raise ConfigError(f"{path} is a key of LLM Foundry that is not known here; {instead}")
        if isinstance(value, Mapping) and path != "variables":
            _refuse_foundry_s(value, f"{path}.")


def _without_ignored_by_model(data: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    model = data.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
        return data
    try:
        schema = getattr(
            default_registry().choose("model", model["name"]).backend.load(), "schema", None
        )
    except BackendError:  # an unknown model is refused where it is built
        return data
    if schema is None:
        return data
    name = {"name": model["name"]}
    rest = {key: value for key, value in model.items() if key != "name"}
    return data | {"model": name | without_ignored(schema, rest, "model", ignored)}
