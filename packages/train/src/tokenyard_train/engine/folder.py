"""The folder of a run: new, resumed or overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tokenyard import ConfigError
from tokenyard.paths import real_path, remove
from tokenyard_train.checkpoint import checkpoints
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.distributed import on_rank0
from tokenyard_train.folder_lock import lock_folder


@contextmanager
def run_folder(config: TrainConfig) -> Iterator[None]:
    """Context: make the run's folder and hold its lock on rank 0. All ranks of a run enter it.

    With `save_overwrite`, metrics, tracker ids and checkpoints of an earlier run in it are deleted.
    Raises ConfigError for a folder that holds a run which is neither to be resumed nor overwritten,
    that another process writes to, or that cannot be made.
    """
    with ExitStack() as held:
        on_rank0(lambda: _prepare(config, held))
        yield


def _check_apart(config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError if the run's files would be among its text."""
    own = real_path(folder)
    parents = [own, *own.parents]
    for key, path in _text_paths(config):
        if real_path(path) in parents:
            raise ConfigError(
                f"save_folder {str(folder)!r} is in the folder {key}.path {path!r}, "
                "whose files are read as text; give another save_folder"
            )


def _text_paths(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield the key and the value of each `path` of text."""
    for name, loader in config.data().loaders().items():
        key = f"{name}.dataset"
        dataset = getattr(loader, "dataset", None)
        streams = getattr(dataset, "streams", None) or {}
        sources = {key: dataset} | {f"{key}.streams.{s}": stream for s, stream in streams.items()}
        for where, source in sources.items():
            paths = getattr(source, "path", None) or []
            yield from ((where, path) for path in ([paths] if isinstance(paths, str) else paths))


def _prepare(config: TrainConfig, held: ExitStack) -> None:
    folder = Path(config.save_folder or ".")
    if os.path.isfile(folder):  # unlike Path.is_file, False for a name that is too long
        raise ConfigError(f"save_folder {str(folder)!r} is a file; give the name of a folder")
    _check_apart(config, folder)
    held.enter_context(lock_folder(folder))
    taken = (folder / "metrics.jsonl").exists() or bool(checkpoints(folder))
    if not taken or config.autoresume:
        return
    if not config.save_overwrite:
        raise ConfigError(
            f"save_folder {str(folder)!r} holds a run already; set autoresume: true to "
            "resume it, save_overwrite: true to delete it, or another run_name"
        )
    # The metrics last: they mark the folder as a run's until all checkpoints are deleted.
    for path in [*checkpoints(folder), folder / "trackers.json", folder / "metrics.jsonl"]:
        try:
            remove(path)
        except OSError as error:
            raise ConfigError(
                f"save_overwrite: {path} cannot be deleted: {error.strerror}; "
                "give another save_folder"
            ) from None
