"""Loading: the newest checkpoint of a run, or the weights that a new run starts from."""

from __future__ import annotations

from pathlib import Path

from tokenyard import Model
from tokenyard_models.hf import Folder, load_weights
from tokenyard_train.checkpoint import (
    CheckpointError,
    clear_unfinished,
    is_checkpoint,
    load_model,
    newest_good,
    read_meta,
    read_newest,
    read_tensors,
)
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data.paths import HF
from tokenyard_train.distributed import on_rank0
from tokenyard_train.engine.agreement import check_agreement, check_data, check_start
from tokenyard_train.engine.save import optimizer_states, run_tensors
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.state import Position
from tokenyard_train.records.metrics import Metrics


def resume(setup: Setup, metrics: Metrics) -> Position:
    """With `autoresume`, load the newest good checkpoint of the run's folder; return its position.

    Without it, or without a checkpoint, the position is 0.

    `metrics` are cut back to that position. Metrics without a checkpoint, or with fewer steps than
    the checkpoint counts, are named in a warning. Raises CheckpointError if the config or the
    content of the text disagrees with the checkpoint's.
    """
    on_rank0(lambda: clear_unfinished(setup.folder))
    newest = newest_good(setup.folder) if setup.config.autoresume else None
    if newest is None:
        metrics.set_aside()
        return Position()
    meta = read_meta(newest)
    check_agreement(setup.config, newest, meta["config"])
    check_data(setup.identity, newest, meta.get("data"))
    read_tensors(newest, run_tensors(setup))
    for name, state in optimizer_states(setup).items():
        if "step" not in state:
            continue
        if name not in meta["optimizer_steps"]:
            raise CheckpointError(
                f"checkpoint {newest}: optimizer_steps of run.json lacks {name}; "
                "take another checkpoint"
            )
        state["step"].fill_(meta["optimizer_steps"][name])
    metrics.rewind(meta["metrics_bytes"])
    return Position(meta["batch"], meta["skipped"])


def start_from(model: Model, path: str, config: TrainConfig | None = None) -> None:
    """Load the weights of a checkpoint, of a run's newest one, or of hf://folder.

    With a `config`, compare it with the checkpoint's, see `check_start`. Raises TokenyardError.
    """
    if path.startswith(HF):
        load_weights(model, Folder(path.removeprefix(HF)))
        return
    folder = Path(path)
    if is_checkpoint(folder):
        _load_checked(model, folder, config)
        return
    if not folder.is_dir():
        raise CheckpointError(
            f"load_path {path!r} does not exist; give a checkpoint such as runs/run/ba200, or its "
            "run"
        )
    if read_newest(folder, lambda newest: _load_checked(model, newest, config)) is None:
        raise CheckpointError(
            f"load_path {path!r} holds no checkpoint; give a folder such as runs/run/ba200"
        )


def _load_checked(model: Model, checkpoint: Path, config: TrainConfig | None) -> Path:
    load_model(model, checkpoint)
    if config is not None:
        check_start(config, checkpoint, read_meta(checkpoint)["config"])
    return checkpoint
