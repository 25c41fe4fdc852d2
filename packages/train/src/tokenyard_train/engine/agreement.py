"""Which keys of a config a resumed run may not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.config.comparable import comparable_config
from tokenyard_train.config.schema import TrainConfig

_MUST_AGREE = (
    "model",
    "max_seq_len",
    "tokenizer",
    "train_loader",
    "global_train_batch_size",
    "seed",
    "precision",
    "frozen",
    "lora",
)
"""With another value, weights would not fit, or other samples would follow."""


class Difference(NamedTuple):
    """A key that has different values in two configs."""

    path: str
    saved: Any
    current: Any


def check_agreement(config: TrainConfig, checkpoint: Path, saved: dict[str, Any]) -> None:
    """Raise CheckpointError if a config disagrees with the one that a checkpoint was saved with."""
    current = _compared(config.model_dump(mode="json"))
    explicit = _compared(config.model_dump(mode="json", exclude_defaults=True))
    for path, old, new in _differences(_compared(saved), current, explicit):
        raise CheckpointError(
            f"{path} is {new!r}, but checkpoint {checkpoint} was made with {old!r}; set it back, "
            "or choose another run_name for a new run"
        )


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a dumped config that must agree."""
    kept = {key: value for key, value in comparable_config(config).items() if key in _MUST_AGREE}
    return kept | {"optimizer": {"name": config.get("optimizer", {}).get("name")}}


def _differences(saved: Any, current: Any, explicit: Any, path: str = "") -> list[Difference]:
    """List the differences of two dumped configs, at any depth.

    An old checkpoint lacks new keys. Such a key counts as changed only if the current config sets
    it to another value than its default: if it is in `explicit`.
    """
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        return [] if saved == current else [Difference(path, saved, current)]
    differences = []
    for key in sorted(saved.keys() | (current.keys() & explicit.keys())):
        below = f"{path}.{key}".lstrip(".")
        differences += _differences(saved.get(key), current.get(key), explicit.get(key, {}), below)
    return differences
