"""Loading: the newest checkpoint of a run, or the weights that a new run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenyard import Model
from tokenyard_models.hf import (
    Folder,
    PeftFolder,
    has_weights,
    is_hf_folder,
    is_peft,
    load_foundry,
    load_weights,
)
from tokenyard_train.checkpoint import (
    CheckpointError,
    clear_unfinished,
    is_checkpoint,
    load_model,
    newest_good,
    read_meta,
    read_newest,
    read_tensors,
    verify,
)
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data.paths import HF
from tokenyard_train.distributed import on_rank0
from tokenyard_train.engine.agreement import check_agreement, check_data, check_start
from tokenyard_train.engine.base import base_digest, check_peft_base
from tokenyard_train.engine.save import optimizer_states, run_tensors
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.state import Base, Position
from tokenyard_train.records.metrics import Metrics


class Origin(NamedTuple):
    """Where frozen weights are from."""

    path: str | None  # None: the initial weights of `seed`
    seed: int = 0


def resume(setup: Setup, metrics: Metrics) -> Position:
    """With `autoresume`, load the newest good checkpoint of the run's folder; return its position.

    Without it, or without a checkpoint, the position is 0, and nothing is loaded.

    `metrics` are cut back to that position. Metrics without a checkpoint, or with fewer steps than
    the checkpoint counts, are named in a warning. Raises CheckpointError if the config, the content
    of the text or the base of adapters disagrees with the checkpoint's.
    """
    on_rank0(lambda: clear_unfinished(setup.folder))
    newest = newest_good(setup.folder) if setup.config.autoresume else None
    if newest is None:
        metrics.set_aside()
        return Position()
    meta = read_meta(newest)
    check_agreement(setup.config, newest, meta["config"])
    check_data(setup.identity, newest, meta.get("data"))
    base = None
    if meta["base"] is not None:
        base = start(setup).base
        _check_base(base, newest, Base(**meta["base"]))
    elif setup.config.lora is not None:
        raise CheckpointError(
            f"checkpoint {newest} of an older version holds the base of its adapters too, so it is "
            "not resumed; start a new run with load_path on it"
        )
    read_tensors(newest, run_tensors(setup, adapters_only=base is not None))
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
    return Position(meta["batch"], meta["skipped"], base)


def start(setup: Setup) -> Position:
    """Load the weights that a new run starts from; return its position.

    Adapters get a base, so that checkpoints hold them alone.
    """
    config = setup.config
    origin = Origin(None, config.seed)
    if config.load_path is not None:
        origin = start_from(setup.model, config.load_path, config)
    if config.lora is None:
        return Position()
    return Position(base=Base(*origin, base_digest(setup.model)))


def start_from(model: Model, path: str, config: TrainConfig | None = None) -> Origin:
    """Load the weights of a checkpoint, of a run's newest one, or of a folder.

    The folder is hf://folder, PEFT's, or one of weights with LLM Foundry's names.

    Returns where they are from; of a checkpoint of adapters, where its base is from. With a
    `config`, compare it with the checkpoint's, see `check_start`. Raises TokenyardError.
    """
    if path.startswith(HF):
        folder = Path(path.removeprefix(HF))
        load_weights(model, Folder(folder))
        return Origin(f"{HF}{folder.resolve()}")
    folder = check_load_path(path)
    if is_peft(folder):
        adapters = PeftFolder(folder)
        base = start_from(model, weights_path(adapters.base))
        adapters.fill(model)
        check_peft_base(model, adapters, str(adapters.base))
        return base
    if is_checkpoint(folder):
        verify(folder)
        return _load_checked(model, folder, config)
    if has_weights(folder):
        load_foundry(model, folder)
        return Origin(str(folder.resolve()))
    origin = read_newest(folder, lambda newest: _load_checked(model, newest, config))
    if origin is None:
        raise CheckpointError(
            f"load_path {path!r} holds no checkpoint; give a folder such as runs/run/ba200"
        )
    return origin


def check_load_path(path: str) -> Path:
    """Return the folder of a load_path. Raises CheckpointError if it does not exist."""
    folder = Path(path.removeprefix(HF))
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"load_path {path!r} {what}; give a checkpoint such as runs/run/ba200, or its run"
        )
    return folder


def load_checkpoint(model: Model, checkpoint: Path, moved: Path | None = None) -> Origin:
    """Fill a model from a verified checkpoint; from one of adapters and from its base.

    `moved` is where the base is now. Returns where the frozen weights are from. Raises
    TokenyardError, also for a base that has other numbers than the adapters were trained on.
    """
    meta = read_meta(checkpoint)
    if meta["base"] is None:
        load_model(model, checkpoint)
        return Origin(str(checkpoint.resolve()))
    base = Base(**meta["base"])
    origin = _load_base(model, checkpoint, base, moved)
    load_model(model, checkpoint)
    _check_base(Base(*origin, base_digest(model)), checkpoint, base)
    return origin


def weights_path(folder: Path) -> str:
    """Return the load_path of a folder: one with a config.json is Hugging Face's."""
    return f"{HF}{folder}" if is_hf_folder(folder) else str(folder)


def _load_base(model: Model, checkpoint: Path, base: Base, moved: Path | None) -> Origin:
    path = base.path if moved is None else weights_path(moved)
    if path is None:
        model.init_weights(base.seed)
        return Origin(None, base.seed)
    if not Path(path.removeprefix(HF)).is_dir():
        raise CheckpointError(
            f"checkpoint {checkpoint} holds adapters alone, and their base {path} does not exist; "
            "bring it back, or give its new place by --base"
        )
    return start_from(model, path)


def _check_base(loaded: Base | None, checkpoint: Path, trained: Base) -> None:
    """Raise CheckpointError if adapters were trained on another base than the one loaded."""
    if loaded is None or loaded.digest != trained.digest:
        raise CheckpointError(
            f"checkpoint {checkpoint} holds adapters of a base with other weights than "
            f"{_name(loaded)} has now; give the base that they were trained on"
            + (f", then in {trained.path}" if trained.path else "")
        )


def _name(base: Base | None) -> str:
    if base is None:
        return "the config's model"
    return base.path or f"the model of seed {base.seed}"


def _load_checked(model: Model, checkpoint: Path, config: TrainConfig | None) -> Origin:
    origin = load_checkpoint(model, checkpoint)
    if config is not None:
        check_start(config, checkpoint, read_meta(checkpoint))
    return origin
