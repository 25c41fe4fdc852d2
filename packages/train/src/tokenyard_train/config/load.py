"""From a YAML file and overrides to a TrainConfig: OmegaConf reads and interpolates, pydantic checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenyard import BackendError, ConfigError, default_registry
from tokenyard_models.schema import parse, warn_ignored, without_ignored
from tokenyard_train.config.resolve import resolve
from tokenyard_train.config.schema import TrainConfig

_MAX_BYTES = 1 << 20


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
    kept = without_ignored(TrainConfig, data, "", ignored)
    kept = _without_ignored_by_model(kept, ignored)
    warn_ignored(ignored)
    return resolve(parse(TrainConfig, kept))


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; a config has at most {_MAX_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _container(text: str, overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(f"override {override!r} is not of the form key=value, such as optimizer.lr=1e-3")
    try:
        _refuse_aliases(text)
        config = OmegaConf.create(text)
        if not isinstance(config, DictConfig) or not config:
            raise ConfigError("a config is a mapping of keys to values, and this is none")
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"not a usable YAML config: {_one_line(error)}") from None
    return {str(key): value for key, value in dict(container).items()}  # type: ignore[arg-type]


def _refuse_aliases(text: str) -> None:
    """Aliases of aliases grow without bound; interpolation does their work."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"the YAML alias *{event.anchor} is not supported; write ${{key}} instead")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _without_ignored_by_model(data: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    model = data.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
        return data
    try:
        schema = getattr(default_registry().choose("model", model["name"]).backend.load(), "schema", None)
    except BackendError:  # an unknown model is refused where it is built
        return data
    if schema is None:
        return data
    name = {"name": model["name"]}
    rest = {key: value for key, value in model.items() if key != "name"}
    return data | {"model": name | without_ignored(schema, rest, "model", ignored)}
