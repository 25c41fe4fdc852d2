"""What a resumed run may not change: keys of its config, and the content of its text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.config.comparable import comparable_config, comparable_models
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import build_tokenizer
from tokenyard_train.distributed import is_rank0

log = logging.getLogger("tokenyard")

_MUST_AGREE = (
    "model",
    "max_seq_len",
    "tokenizer",
    "train_loader",
    "global_train_batch_size",
    "seed",
    "frozen",
    "lora",
    "load_path",
)
"""With another value, weights would not fit, other samples would follow, or run.json be wrong."""

_MAY_CHANGE = (
    "optimizer",
    "scheduler",
    "algorithms",
    "max_duration",
    "precision",
    "deterministic",
    "nonfinite",
    "nonfinite_limit",
)
"""A resumed run may change them. They apply from its next step, and a warning lists them."""


class Difference(NamedTuple):
    """A key that has different values in two configs."""

    path: str
    saved: Any
    current: Any


def check_agreement(config: TrainConfig, checkpoint: Path, saved: dict[str, Any]) -> None:
    """Raise CheckpointError if a config disagrees with the one that a checkpoint was saved with."""
    current = _compared(config.model_dump(mode="json"))
    explicit = _compared(config.model_dump(mode="json", exclude_defaults=True))
    before = _compared(saved)
    before["model"], current["model"] = comparable_models(before["model"], current["model"])
    for path, old, new in _differences(before, current, explicit):
        raise CheckpointError(
            f"{path} is {new!r}, but checkpoint {checkpoint} was made with {old!r}; set it back, "
            "or choose another run_name for a new run"
        )
    _warn_of_changes(config, checkpoint, saved)


def _warn_of_changes(config: TrainConfig, checkpoint: Path, saved: dict[str, Any]) -> None:
    """Log a warning that lists the keys of `_MAY_CHANGE` that differ from a checkpoint's."""
    before = {key: saved.get(key) for key in _MAY_CHANGE if key in saved}
    now = config.model_dump(mode="json", include=set(_MAY_CHANGE))
    explicit = config.model_dump(mode="json", include=set(_MAY_CHANGE), exclude_defaults=True)
    changes = _differences(before, now, explicit)
    if changes and is_rank0():
        listed = ", ".join(f"{path} is {new!r} (was {old!r})" for path, old, new in changes)
        log.warning("resuming %s with other values: %s", checkpoint, listed)


def check_data(
    identity: Mapping[str, str], checkpoint: Path, saved: Mapping[str, str] | None
) -> None:
    """Raise CheckpointError if the tokenizer or the text has other content than a checkpoint's.

    `identity` and `saved` hold a digest for each config key; see `Data.identity`. A checkpoint of
    an older version has none; a warning says that nothing is compared.
    """
    if saved is None:
        if is_rank0():
            log.warning("checkpoint %s does not record its text, so it is not compared", checkpoint)
        return
    for key, digest in identity.items():
        if saved.get(key) != digest:
            raise CheckpointError(
                f"{key} has other content than checkpoint {checkpoint} was trained on, so other "
                "samples would follow; bring the former content back, or choose another run_name "
                "for a new run, which load_path can start from these weights"
            )


def check_start(config: TrainConfig, checkpoint: Path, meta: dict[str, Any]) -> None:
    """Compare a config with that of the checkpoint whose weights its run starts from.

    Raises CheckpointError if the config names no tokenizer and the checkpoint has another than the
    default, and for a tokenizer of the same name with other content. Logs a warning for a tokenizer
    that the config names, and for keys of `model`.
    """
    saved = meta["config"]
    current = comparable_config(config.model_dump(mode="json"))
    explicit = comparable_config(config.model_dump(mode="json", exclude_defaults=True))
    kept = comparable_config(saved)
    if kept["tokenizer"] != current["tokenizer"] and "tokenizer" not in config.model_fields_set:
        name = kept["tokenizer"]["name"]
        raise CheckpointError(
            f"checkpoint {checkpoint} was trained with the tokenizer {name!r}, and the config "
            f"names none; give tokenizer.name {name!r}, or another"
        )
    kept["model"], current["model"] = comparable_models(kept["model"], current["model"])
    if kept["tokenizer"] == current["tokenizer"]:
        _check_tokenizer(config, checkpoint, meta)
    for key in ("tokenizer", "model"):
        differences = _differences(kept[key], current[key], explicit.get(key, {}), key)
        for path, old, new in differences:
            if path != "model.max_seq_len":  # samples may be shorter or longer
                log.warning("%s is %r, but load_path %s has %r", path, new, checkpoint, old)


def _check_tokenizer(config: TrainConfig, checkpoint: Path, meta: dict[str, Any]) -> None:
    """Raise CheckpointError if the content of the tokenizer is not what a checkpoint records."""
    saved = (meta["data"] or {}).get("tokenizer")
    if saved not in (None, build_tokenizer(config.tokenizer).identity):
        raise CheckpointError(
            f"tokenizer {config.tokenizer.name!r} has other content than load_path {checkpoint} "
            "was trained with; bring the former content back, or give tokenizer.name another path"
        )


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a dumped config that must agree."""
    kept = {key: value for key, value in comparable_config(config).items() if key in _MUST_AGREE}
    optimizer = config.get("optimizer", {})
    kinds = {key: optimizer.get(key) for key in ("name", "moments") if key in optimizer}
    if "muon" in optimizer:
        patterns = {k: v for k, v in optimizer["muon"].items() if k in ("include", "exclude")}
        kinds |= {"muon": patterns}
    return kept | {"optimizer": kinds}


def _differences(saved: Any, current: Any, explicit: Any, path: str = "") -> list[Difference]:
    """List the differences of two dumped configs, at any depth.

    An old checkpoint lacks new keys. Such a key counts as changed only if the current config sets
    it to another value than its default: if it is in `explicit`. Of sections with another name,
    only the name is listed.
    """
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        return [] if saved == current else [Difference(path, saved, current)]
    if saved.get("name") != current.get("name"):  # other keys differ only because of it
        return [Difference(f"{path}.name".lstrip("."), saved.get("name"), current.get("name"))]
    differences = []
    for key in sorted(saved.keys() | (current.keys() & explicit.keys())):
        below = f"{path}.{key}".lstrip(".")
        differences += _differences(saved.get(key), current.get(key), explicit.get(key, {}), below)
    return differences
