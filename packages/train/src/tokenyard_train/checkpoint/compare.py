"""Compare the tensors that a checkpoint holds with those that a model or a run asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch

ADAPTER = ".adapter."
"""Part of the name of every LoRA tensor."""

_SHOWN = 4  # names in an error


class TensorKind(NamedTuple):
    """The shape of a whole tensor over all shards, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def find_mismatch(held: Mapping[str, TensorKind], wanted: Mapping[str, TensorKind]) -> str | None:
    """Return the first difference by name, shape or dtype as the end of a sentence; None if equal.

    The first part of a name is its kind: ``model`` or ``optimizer``. A kind is read as a whole or
    not at all, so a held tensor of a wanted kind is a difference if nothing asks for it.
    """
    kinds = {_kind(name) for name in wanted}
    missing = [name for name in wanted if name not in held]
    extra = [name for name in held if _kind(name) in kinds and name not in wanted]
    if any(ADAPTER in name for name in (*missing, *extra)):
        return _adapter_sentence(missing, extra)
    parts = []
    if missing:
        parts.append(f"it lacks {_names(missing)}")
    if extra:
        parts.append(f"it holds {_names(extra)}, which the config's model does not have")
    if parts:
        return f"{', and '.join(parts)}; set the keys of model as in its run.json"
    for name, kind in wanted.items():
        if held[name].shape != kind.shape:
            return f"{name} has the shape {[*held[name].shape]} there, and {[*kind.shape]} here"
        if held[name].dtype != kind.dtype:
            return f"{name} has the dtype {held[name].dtype} there, and {kind.dtype} here"
    return None


def _kind(name: str) -> str:
    return name.partition(".")[0]


def _adapter_sentence(missing: Iterable[str], extra: Iterable[str]) -> str:
    lacked = [name for name in missing if ADAPTER in name]
    unused = [name for name in extra if ADAPTER in name]
    if unused:
        what = f"it holds LoRA adapters that the config's model does not have ({_names(unused)})"
    else:
        what = f"it lacks LoRA adapters of the config's model ({_names(lacked)})"
    return (
        f"{what}; give the same lora section, or merge the adapters by "
        "tokenyard convert RUN FOLDER and start from hf://FOLDER"
    )


def _names(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
