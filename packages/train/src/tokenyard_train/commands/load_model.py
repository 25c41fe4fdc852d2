"""Load a model from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import atexit
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenyard import ConfigError, add_lora, resolve_device
from tokenyard.lora import adapters
from tokenyard.sharded import allocate
from tokenyard_models import from_hf
from tokenyard_models.hf import PeftFolder, is_hf_folder, is_peft
from tokenyard_train.checkpoint import (
    is_checkpoint,
    read_meta,
    read_newest,
    verify,
)
from tokenyard_train.commands.loaded_model import LoadedModel
from tokenyard_train.config.comparable import comparable_config
from tokenyard_train.config.load import read_config
from tokenyard_train.data.paths import HF
from tokenyard_train.data.schema import FinetuningDataset, TokenizerConfig
from tokenyard_train.engine.base import check_peft_base
from tokenyard_train.engine.build_model import build_model
from tokenyard_train.engine.precision import (
    AMP_BF16,
    BF16_MASTER,
    COMPUTE_DTYPES,
    check_precision,
    narrow,
    narrow_experts,
)
from tokenyard_train.engine.resume import load_checkpoint

log = logging.getLogger("tokenyard")

_REGISTRY = "models:"  # the start of a name in MLflow's registry
_REGISTERED = re.compile(r"models:/([^/@]+(/[^/@]+|@[^/@]+)|m-[^/@]+)")  # m-...: an id of MLflow 3
_MEGABLOCKS = "megablocks.json"  # in a folder that `to_megablocks` wrote


def load_trained(
    path: Path, device: str = "auto", precision: str | None = None, base: Path | None = None
) -> LoadedModel:
    """Load a folder of Hugging Face or PEFT, a checkpoint, or a run's newest good one on a device.

    A path ``models:/NAME/VERSION`` names a model in MLflow's registry.
    `base` is where the base of adapters is now, if it moved. `precision` is one of COMPUTE_DTYPES.
    The default is the precision of training for a run, and the dtype of the weights for a Hugging
    Face folder. Raises TokenyardError.
    """
    path = _downloaded(path)
    target = resolve_device(device, "--device")
    if precision is not None:
        check_precision(precision, "--precision")
    if is_hf_folder(path):
        _refuse_base(path, base)
        return _load_hf_folder(path, target, precision)
    if is_peft(path):
        return _load_adapters(path, base, lambda folder: _load_hf_folder(folder, target, precision))
    overrides = {} if precision is None else {"precision": precision}
    return _load_run(path, {"device": str(target)} | overrides, base)


def load_weights_only(
    path: Path, base: Path | None = None, dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load a model into host memory to read its weights. Ignores the config's backends.

    `base` is where the base of adapters is now, if it moved. The weights of a Hugging Face folder
    are read in `dtype` (default: the folder's), and PEFT's adapters in float32; their base is never
    read in float16.
    """
    path = _downloaded(path)
    if is_hf_folder(path):
        _refuse_base(path, base)
        return _read_hf_folder(path, dtype)
    if is_peft(path):
        # float16 would round small weights, and the digest of the base is of the rounded ones
        read_dtype = None if dtype == torch.float16 else dtype
        return _load_adapters(
            path, base, lambda folder: _read_hf_folder(folder, read_dtype), torch.float32
        )
    return _load_run(path, {"device": "cpu", "backends": {}, "precision": "fp32"}, base)


def _downloaded(path: Path) -> Path:
    """Return the path, or the folder of a model that ``models:/NAME/VERSION`` names.

    The folder is deleted when this process ends. Raises ConfigError.
    """
    if not str(path).startswith(_REGISTRY):
        return path
    if not _REGISTERED.fullmatch(str(path)):
        raise ConfigError(
            f"{path} names no model of MLflow's registry; give models:/NAME/VERSION or "
            "models:/NAME@ALIAS"
        )
    from tokenyard_train.records.trackers.mlflow import download_model

    folder = tempfile.TemporaryDirectory(prefix="tokenyard-")
    atexit.register(folder.cleanup)
    return download_model(str(path), Path(folder.name))


def _load_hf_folder(path: Path, device: torch.device, precision: str | None) -> LoadedModel:
    if precision is None:
        model = from_hf(path, device=device)
    else:
        model = from_hf(
            path, device=device, dtype=torch.float32, compute_dtype=COMPUTE_DTYPES[precision]
        )
    return LoadedModel(model, precision, TokenizerConfig(name=str(path)), path, source=path)


def _read_hf_folder(path: Path, dtype: torch.dtype | None) -> LoadedModel:
    model = from_hf(path, dtype=dtype)
    return LoadedModel(model, None, TokenizerConfig(name=str(path)), path, source=path)


def _load_adapters(
    path: Path,
    base: Path | None,
    load: Callable[[Path], LoadedModel],
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a folder of PEFT. `load` loads the Hugging Face folder that its adapters are for.

    The adapters have the dtype of the weights beside them, or another `dtype`.
    """
    folder = PeftFolder(path)
    if base is not None and folder.base_digest is None:
        log.warning(
            "%s does not record the weights of its base, so that --base %s is not compared with it",
            path,
            base,
        )
    loaded = load(base or folder.base)
    add_lora(loaded.model, folder.settings, folder.targets(loaded.model))
    if dtype is not None:
        for _, _, adapter in adapters(loaded.model):
            adapter.to(dtype)
    folder.fill(loaded.model)
    check_peft_base(loaded.model, folder, str(base or folder.base))
    return loaded


def _load_run(path: Path, overrides: dict[str, Any], base: Path | None) -> LoadedModel:
    """Load a checkpoint, or a run's newest good one, with some keys of its config replaced."""
    if is_checkpoint(path):
        verify(path)
        return _load_checkpoint(path, overrides, base)
    loaded = read_newest(path, lambda newest: _load_checkpoint(newest, overrides, base))
    if loaded is None and str(path).startswith("hf:/"):
        raise ConfigError(f"{path} is the form of load_path; leave hf:// out here")
    if loaded is None and (path / _MEGABLOCKS).is_file():
        raise ConfigError(
            f"{path} is in MegaBlocks' format, which is written and not read; give the run or the "
            "folder that it was written from"
        )
    if loaded is None:
        raise ConfigError(
            f"{path} holds no checkpoint; give the folder of a run, such as runs/quickstart, "
            "or one from Hugging Face"
        )
    return loaded


def _load_checkpoint(checkpoint: Path, overrides: dict[str, Any], base: Path | None) -> LoadedModel:
    """Load a verified checkpoint, with some keys of its config replaced."""
    # The batch size of one process. The weights come from the checkpoint, not from load_path.
    inference = {"global_train_batch_size": 1, "device_train_microbatch_size": 1, "load_path": None}
    meta = read_meta(checkpoint)
    if meta["base"] is None:
        _refuse_base(checkpoint, base)
    saved = comparable_config(meta["config"]) | inference | overrides
    config = read_config(saved, needs_tokenizer=False)
    _, model = build_model(config)
    allocate(model, config.device)
    for buffer in model.buffers():
        buffer.zero_()
    origin = load_checkpoint(model, checkpoint, base)
    if config.precision == BF16_MASTER:
        narrow(model)
    if config.precision == AMP_BF16:
        narrow_experts(model)
    digest = (meta["data"] or {}).get("tokenizer")
    source = _hf_source(meta["config"].get("load_path")) or _hf_source(origin.path)
    saved_ids = None if meta["stop_ids"] is None else frozenset(meta["stop_ids"])
    dataset = config.train_loader.dataset
    return LoadedModel(
        model,
        config.precision,
        _moved_tokenizer(config.tokenizer, source),
        checkpoint,
        digest,
        saved_ids,
        dataset.chat_template if isinstance(dataset, FinetuningDataset) else None,
        source,
    )


def _moved_tokenizer(tokenizer: TokenizerConfig, source: Path | None) -> TokenizerConfig:
    """Return a tokenizer, or that of the source if the former's path is not here.

    A path in a config may be relative to another folder. The content is compared by its digest.
    """
    named = tokenizer.name in ("bytes", "tiktoken") or Path(tokenizer.name).exists()
    if named or source is None or not (source / "tokenizer.json").is_file():
        return tokenizer
    return tokenizer.model_copy(update={"name": str(source)})


def _refuse_base(path: Path, base: Path | None) -> None:
    """Raise ConfigError for a base of weights that are no adapters."""
    if base is not None:
        raise ConfigError(
            f"--base {base} has no effect, because {path} holds a whole model and no adapters; "
            "leave it out"
        )


def _hf_source(load_path: str | None) -> Path | None:
    """Return the Hugging Face folder that a run started from, if it still exists."""
    if not load_path:
        return None
    folder = Path(load_path.removeprefix(HF))
    return folder if is_hf_folder(folder) else None
