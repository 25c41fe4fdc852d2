"""Callbacks of a config: ours, and those that installed distributions offer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.callbacks.generate import Generate
from tokenyard_train.callbacks.ngram import Baseline
from tokenyard_train.config.schema import CALLBACKS, Callbacks
from tokenyard_train.engine.callback import Callback


def build_callbacks(config: Callbacks) -> list[Callback]:
    """Return the callbacks that a config asks for: ours, and those of installed distributions.

    Raises ConfigError for options that an installed one refuses.
    """
    callbacks: list[Callback] = []
    if config.ngram_baselines is not None:
        callbacks.append(Baseline())
    if config.generate_callback is not None:
        callbacks.append(Generate(config.generate_callback))
    return callbacks + [
        _installed(name, options or {}) for name, options in (config.model_extra or {}).items()
    ]


def _installed(name: str, options: Mapping[str, Any]) -> Callback:
    (point,) = entry_points(group=CALLBACKS, name=name)
    try:
        callback: Callback = point.load()(**options)
    except Exception as error:
        raise ConfigError(f"callbacks.{name} cannot be made of {dict(options)}: {error}") from error
    return callback
