"""Build the callbacks of a config: built-in ones, and those of installed distributions."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from tokenyard import ConfigError
from tokenyard.foreign import attempt
from tokenyard_train.callbacks.early_stopper import EarlyStopper
from tokenyard_train.callbacks.generate import TextGenerator
from tokenyard_train.callbacks.ngram import NgramScorer
from tokenyard_train.config.callbacks import CALLBACKS, Callbacks
from tokenyard_train.engine.callback import Callback


def build_callbacks(config: Callbacks) -> list[Callback]:
    """Return the callbacks of a config, built-in ones first.

    Raises ConfigError for options that an installed callback refuses.
    """
    callbacks: list[Callback] = []
    if config.ngram_baselines is not None:
        callbacks.append(NgramScorer())
    if config.generate_callback is not None:
        callbacks.append(TextGenerator(config.generate_callback))
    if config.early_stopper is not None:
        callbacks.append(EarlyStopper(config.early_stopper))
    return callbacks + [
        _build_installed(name, options or {})
        for name, options in (config.model_extra or {}).items()
    ]


def _build_installed(name: str, options: Mapping[str, Any]) -> Callback:
    points = list(entry_points(group=CALLBACKS, name=name))
    if len(points) > 1:
        owners = " and ".join(sorted(p.dist.name if p.dist else p.value for p in points))
        raise ConfigError(f"callbacks.{name} is offered by both {owners}; uninstall one of them")
    callback, fault = attempt(lambda: points[0].load()(**options))
    if fault is not None:
        raise ConfigError(f"callbacks.{name} cannot be made of {dict(options)}: {fault}")
    if not isinstance(callback, Callback):
        raise ConfigError(
            f"callbacks.{name} is a {type(callback).__name__}, which does not derive from "
            "tokenyard_train.Callback; derive it"
        )
    return callback
