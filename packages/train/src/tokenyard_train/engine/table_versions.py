"""Choose the version of each Delta table once, so that a run and its resumes read the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from tokenyard_train.checkpoint import CheckpointError, checkpoints, read_meta
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data.schema import RowSource, Source
from tokenyard_train.data.sources import newest_version
from tokenyard_train.distributed import on_rank0

Place = tuple[str, ...]
"""The keys that lead to a source in a config."""


def choose_versions(config: TrainConfig) -> TrainConfig:
    """Return a config in which each Delta table has a version.

    A table without one has the version of the checkpoint that the run resumes, else its newest. All
    ranks of a run call this, after they have joined it. Raises ConfigError for a table that cannot
    be opened.
    """
    open_places = [place for place, source in _tables(config) if source.version is None]
    if not open_places:
        return config
    versions = on_rank0(lambda: _versions(config))
    for place in open_places:
        config = _replaced(config, place, versions[".".join(place)])
    return config


def table_versions(config: TrainConfig) -> dict[str, str]:
    """Return the location and version of each Delta table, by config key."""
    return {
        ".".join(place): f"{source.delta}, version {source.version}"
        for place, source in _tables(config)
    }


def _tables(config: TrainConfig) -> Iterator[tuple[Place, Source | RowSource]]:
    """Yield the place and the source of each Delta table. A stream has its dataset's version."""
    loaders: dict[Place, Any] = {
        ("train_loader",): config.train_loader,
        ("eval_loader",): config.eval_loader,
    }
    loaders |= {("eval_loaders", label): each for label, each in config.eval_loaders.items()}
    for key, loader in loaders.items():
        dataset = getattr(loader, "dataset", None)
        if not isinstance(dataset, Source | RowSource):
            continue
        place = (*key, "dataset")
        if dataset.delta is not None:
            yield place, dataset
        for stream, source in (getattr(dataset, "streams", None) or {}).items():
            if source.delta is not None:
                version = dataset.version if source.version is None else source.version
                yield (
                    (*place, "streams", stream),
                    source.model_copy(update={"version": version}),
                )


def _versions(config: TrainConfig) -> dict[str, int]:
    """Return the version of each table without one, by its dotted place."""
    saved = _saved_config(config) if config.autoresume else {}
    versions = {}
    for place, source in _tables(config):
        if source.version is None:
            key = ".".join(place)
            before = _section(saved, place)
            same = before.get("delta") == source.delta and type(before.get("version")) is int
            versions[key] = before["version"] if same else newest_version(source, key)
    return versions


def _saved_config(config: TrainConfig) -> Mapping[str, Any]:
    """Return the config of the newest checkpoint that can be read; empty if there is none."""
    for checkpoint in reversed(checkpoints(Path(config.save_folder or "."))):
        try:
            saved: dict[str, Any] = read_meta(checkpoint)["config"]
            return saved
        except CheckpointError:
            continue  # `resume` names the fault, and tries the checkpoint before it
    return {}


def _section(config: Mapping[str, Any], place: Sequence[str]) -> Mapping[str, Any]:
    """Return a section of a dumped config; empty if there is none."""

    def below(section: Any, key: str) -> Any:
        return section.get(key) if isinstance(section, Mapping) else None

    found = reduce(below, place, config)
    return found if isinstance(found, Mapping) else {}


def _replaced(section: Any, place: Sequence[str], version: int) -> Any:
    """Return a section with the version of the source at a place below it."""
    if not place:
        return section.model_copy(update={"version": version})
    first = place[0]
    if isinstance(section, dict):
        return section | {first: _replaced(section[first], place[1:], version)}
    return section.model_copy(
        update={first: _replaced(getattr(section, first), place[1:], version)}
    )
