"""The folder of a run: new, resumed or overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenyard import ConfigError
from tokenyard_train.checkpoint import checkpoints
from tokenyard_train.config.schema import TrainConfig


def prepare_folder(config: TrainConfig) -> Path:
    """Make the run's folder and return it.

    With `save_overwrite`, metrics, tracker ids and checkpoints of an earlier run in it are deleted.
    Raises ConfigError for a
    folder that holds a run which is neither to be resumed nor overwritten, or cannot be made.
    """
    folder = Path(config.save_folder or ".")
    taken = (folder / "metrics.jsonl").exists() or bool(checkpoints(folder))
    if taken and not config.autoresume:
        if not config.save_overwrite:
            raise ConfigError(
                f"save_folder {str(folder)!r} holds a run already; set autoresume: true to go on "
                "with it, save_overwrite: true to delete it, or another run_name"
            )
        for path in [folder / "metrics.jsonl", folder / "trackers.json", *checkpoints(folder)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"save_folder {str(folder)!r} cannot be made: {error.strerror}") from None
    return folder
