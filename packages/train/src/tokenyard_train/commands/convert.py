"""From a run to a Hugging Face folder and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenyard import ConfigError, merge_lora
from tokenyard.errors import one_of
from tokenyard_models import from_hf, to_hf
from tokenyard_models.hf import Folder, model_section, to_megablocks
from tokenyard_train.checkpoint import model_tensors, write_checkpoint
from tokenyard_train.commands.load_model import load_weights_only
from tokenyard_train.config.load import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FORMS = ("hf", "tokenyard", "megablocks")


def convert(
    source: Path, target: Path, to: str, dtype: str | None, fused: bool, like: Path | None
) -> None:
    """Write the model at `source`, a run, a checkpoint or a Hugging Face folder, in another form to a new folder.

    `dtype` (a name of DTYPES), `fused` and `like` are those of to_hf; `like` is by default the folder that the weights
    came from. Raises TokenyardError, and then nothing is written.
    """
    one_of("--to", to, _FORMS)
    if dtype is not None:
        one_of("--dtype", dtype, DTYPES)
    if target.exists():
        raise ConfigError(f"{target} exists already; give the name of a new folder")
    if to == "tokenyard":
        _to_run(source, target)
        return
    found, stored = load_weights_only(source), None if dtype is None else DTYPES[dtype]
    merge_lora(found.model)
    if to == "megablocks":
        to_megablocks(found.model, target, dtype=stored)
    else:
        to_hf(found.model, target, like=like or found.source, dtype=stored, fused=fused)


def _to_run(source: Path, target: Path) -> None:
    """Write a Hugging Face folder as the only checkpoint of a run that has taken no step."""
    name, section = model_section(Folder(source))
    tokenizer = {"name": str(source.resolve())} if (source / "tokenizer.json").exists() else {}
    config = read_config(
        {
            "model": {"name": name} | section,
            "tokenizer": tokenizer,
            "train_loader": {"name": "python_stdlib"},
            "max_duration": "1ba",
            "global_train_batch_size": 1,
            "device": "cpu",
        }
    )
    meta: dict[str, Any] = {"batch": 0, "config": config.model_dump(mode="json")}
    model = from_hf(source, dtype=torch.float32)
    write_checkpoint(target, "ba0", model_tensors(model), meta, keep=-1)
