"""Read adapter_config.json of PEFT: what is supported, and which modules have adapters."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenyard_models.hf._folder import WeightsError
from tokenyard_models.hf._peft_places import Place

log = logging.getLogger("tokenyard")

_READ: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_rslora": (None, False, True),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # others change
    "loftq_config": (None, {}),  # the base
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
"""Keys of adapter_config.json -> the values that are read."""

_LISTS = ("target_modules", "target_parameters", "exclude_modules")

_UNUSED = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
        *("exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        *("megatron_config", "megatron_core", "eva_config", "qalora_group_size", "runtime_config"),
        *("ensure_weight_tying", "rank_pattern", "alpha_pattern"),
    )
)
"""Keys that are read elsewhere, or that do not change what adapters compute."""


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError for a value that is not read. Log a warning for unknown keys."""
    for key in _LISTS:
        if not isinstance(config.get(key), list | str | None):
            raise WeightsError(f"{path} has {key} {config[key]!r}; it must be a list of names")
    for key, values in _READ.items():
        if config.get(key) not in values:
            read = " or ".join(map(repr, values))
            raise WeightsError(
                f"{path} has {key} {config.get(key)!r}; read is {read} only: merge the adapters "
                "by PEFT's merge_and_unload"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(config.get(key) or {}, key, path)
    known = _READ.keys() | _UNUSED
    unknown = sorted(key for key, value in config.items() if key not in known and value)
    if unknown:
        log.warning(
            "%s has keys that are not known here and are left out: %s", path, ", ".join(unknown)
        )


def _check_pattern(patterns: Any, key: str, path: Path) -> None:
    """Raise WeightsError for a pattern that is not a name, and for a value that is no number."""
    if not isinstance(patterns, dict):
        raise WeightsError(f"{path} has {key} {patterns!r}; it must map names to numbers")
    for pattern, value in patterns.items():
        whole = int if key == "rank_pattern" else int | float
        if isinstance(value, bool) or not isinstance(value, whole) or value <= 0:
            raise WeightsError(f"{path} has {value!r} in {key}; give a number above 0")
        if not re.fullmatch(r"[\w.]+", _plain(pattern)):
            raise WeightsError(
                f"{path} has the {key} {pattern!r}, and regular expressions are not run; merge the "
                "adapters by PEFT's merge_and_unload"
            )


def value_of(patterns: Mapping[str, Any] | None, place: Place, default: float) -> float:
    """Return what a rank_pattern or alpha_pattern says of a place: its first that matches."""
    full = ".".join(filter(None, place))
    for pattern, value in (patterns or {}).items():
        if f".{full}".endswith(f".{_plain(pattern)}"):
            return float(value)
    return default


def _plain(pattern: str) -> str:
    """Return the name of a pattern that PEFT itself writes, such as ``.*\\.gate_up_proj``."""
    return pattern.removeprefix(r".*\.").replace(r"\.", ".")


def is_targeted(config: Mapping[str, Any], place: Place) -> bool | None:
    """Return whether adapter_config.json gives a place an adapter, by PEFT's rules.

    None if it says so by a regular expression, which is not run.
    """
    if place.parameter is not None:
        return _names(config.get("target_parameters"), f"{place.module}.{place.parameter}")
    excluded = _names(config.get("exclude_modules"), place.module)
    named = _names(config.get("target_modules"), place.module)
    if named is None or excluded is None or config.get("layers_pattern"):
        return None
    layers = config.get("layers_to_transform")
    layer = re.search(r"\.(\d+)\.", place.module)
    if layers is not None and layer is not None:
        named = named and int(layer[1]) in (layers if isinstance(layers, list) else [layers])
    return named and not excluded


def _names(listed: Any, name: str) -> bool | None:
    """Return whether a list holds a name or an end of it; None for a regular expression."""
    if isinstance(listed, str):
        return None
    return any(name == each or name.endswith(f".{each}") for each in listed or [])
