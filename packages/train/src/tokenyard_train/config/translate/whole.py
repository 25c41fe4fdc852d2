"""Translate all sections of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenyard_train.config.translate.callbacks import translate_callbacks
from tokenyard_train.config.translate.change import Change
from tokenyard_train.config.translate.data import translate_loaders, translate_tokenizer
from tokenyard_train.config.translate.hf_model import translate_model
from tokenyard_train.config.translate.layout import translate_layout
from tokenyard_train.config.translate.weights import check_weights

_INTERVALS = ("max_duration", "eval_interval", "save_interval", "console_log_interval")


def translate(
    config: Mapping[str, Any], changes: list[Change], ignored: list[str], processes: int
) -> dict[str, Any]:
    """Return a config in the keys of this package, for a run of `processes`.

    Appends what was read differently to `changes`, and the paths of keys without a meaning here to
    `ignored`. Raises ConfigError for what cannot be translated.
    """
    check_weights(config)
    config = _epochs(config, changes)
    config = translate_tokenizer(config, changes)
    config = translate_loaders(config, changes)
    config = translate_callbacks(config, changes)
    config = translate_model(config, changes, ignored)
    return translate_layout(config, changes, ignored, processes)


def _epochs(config: Mapping[str, Any], changes: list[Change]) -> dict[str, Any]:
    """Return a config in which the intervals that are bare integers are epochs, as in Composer."""
    read = dict(config)
    for key in _INTERVALS:
        value = read.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            read[key] = f"{value}ep"
            changes.append(Change(key, f"{value}ep; a number without a unit counts epochs"))
    return read
