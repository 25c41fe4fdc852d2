"""What a checkpoint of a run holds, and going on from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tokenyard_models.hf import Folder, load_weights
from tokenyard_train.checkpoint import (
    CheckpointError,
    clear_unfinished,
    load_model,
    model_tensors,
    newest_good,
    read_meta,
    read_tensors,
)
from tokenyard_train.config.comparable import layout_free
from tokenyard_train.config.from_hf import HF
from tokenyard_train.distributed import on_first
from tokenyard_train.engine.optimizer import trainable
from tokenyard_train.engine.setup import Run

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
"""Keys of the config that a resumed run may not change: weights would not fit, or other samples would follow."""


def save(run: Run) -> None:
    """Begin to save model, optimizer and position as ``ba<step>`` in the run's folder; `run.saver` finishes it."""
    _, steps = _optimizer_state(run)
    meta = {
        "batch": run.batch,
        "skipped": run.skipped,
        "metrics_bytes": run.metrics.size(),
        "optimizer_steps": steps,
        "config": run.config.model_dump(mode="json"),
    }
    run.saver.save(f"ba{run.batch}", _tensors(run), meta)


def resume(run: Run) -> int:
    """With `autoresume`, load the newest good checkpoint of the run's folder; return the step to go on from.

    Raises CheckpointError if the config disagrees with it.
    """
    on_first(lambda: clear_unfinished(run.folder))
    newest = newest_good(run.folder) if run.config.autoresume else None
    if newest is None:
        run.metrics.rewind(0)
        return 0
    meta = read_meta(newest)
    _check_agreement(run, newest, meta["config"])
    read_tensors(newest, _tensors(run))
    for name, state in _state_by_name(run).items():
        state["step"].fill_(meta["optimizer_steps"][name])
    run.metrics.rewind(meta["metrics_bytes"])
    run.skipped = int(meta.get("skipped", 0))
    return int(meta["batch"])


def start_from(run: Run, path: str) -> None:
    """Take the weights of a checkpoint folder (or a run's newest, or hf://folder). Raises TokenyardError."""
    if path.startswith(HF):
        load_weights(run.model, Folder(path.removeprefix(HF)))
        return
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"load_path {path!r} does not exist; give a checkpoint such as runs/run/ba200, or its run"
        )
    newest = folder if (folder / "manifest.json").exists() else newest_good(folder)
    if newest is None:
        raise CheckpointError(
            f"load_path {path!r} holds no checkpoint; give a folder such as runs/run/ba200"
        )
    load_model(run.model, newest)


def _tensors(run: Run) -> dict[str, Tensor]:
    return model_tensors(run.model) | _optimizer_state(run)[0]


def _optimizer_state(run: Run) -> tuple[dict[str, Tensor], dict[str, int]]:
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for name, state in _state_by_name(run).items():
        tensors |= {f"optimizer.{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        steps[name] = int(state["step"].item())
    return tensors, steps


def _state_by_name(run: Run) -> dict[str, dict[str, Tensor]]:
    """Return AdamW's state of each parameter, making it where no step has been taken."""
    return {
        name: run.optimizer.moments(parameter) for name, parameter in trainable(run.model).items()
    }


def _check_agreement(run: Run, checkpoint: Path, saved: dict[str, Any]) -> None:
    now = _to_agree(run.config.model_dump(mode="json"))
    given = _to_agree(run.config.model_dump(mode="json", exclude_defaults=True))
    for path, old, new in _differences(_to_agree(saved), now, given):
        raise CheckpointError(
            f"{path} is {new!r}, but checkpoint {checkpoint} was made with {old!r}; set it back, or choose "
            "another run_name for a new run"
        )


def _to_agree(config: dict[str, Any]) -> dict[str, Any]:
    agreeing = {key: value for key, value in layout_free(config).items() if key in _MUST_AGREE}
    return agreeing | {"optimizer": {"name": config.get("optimizer", {}).get("name")}}


def _differences(before: Any, after: Any, given: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return where two configs differ. A key that is newer than the first means its default there, so it counts only
    if it stands in `given`: the second without its defaults."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | (after.keys() & given.keys()))
        inside = [
            (before.get(k), after.get(k), given.get(k, {}), f"{path}.{k}".lstrip(".")) for k in keys
        ]
        return [found for arguments in inside for found in _differences(*arguments)]
    return [] if before == after else [(path, before, after)]
