"""The JSON part of a checkpoint: the run's position and config, with the type of each key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenyard.bounded import read_json
from tokenyard_train.checkpoint.manifest import CheckpointError

META = "run.json"
"""File in a checkpoint: the run's state and config as JSON, everything that is not a tensor."""

_NAME = re.compile(r"ba(\d+)")

_Count = Annotated[int, Field(ge=0, le=10**15, strict=True)]


class _Named(BaseModel):
    """A section that says which kind it is."""

    name: str


class _Lora(BaseModel):
    """What is read of the section `lora`."""

    rank: int = Field(ge=1, strict=True)
    alpha: float = Field(gt=0, strict=True)
    use_rslora: bool = Field(False, strict=True)


class _Base(BaseModel):
    """The base of a checkpoint that holds adapters alone."""

    path: str | None  # None: the initial weights of `seed`
    seed: int
    digest: str


class _Config(BaseModel):
    """What is read of a saved config by itself. The rest is compared, or validated as a config."""

    model: _Named
    tokenizer: _Named
    optimizer: dict[str, Any] = {}
    lora: _Lora | None = None
    load_path: str | None = None


class _Meta(BaseModel):
    """What a checkpoint must say. Defaults are those of checkpoints without a trained step."""

    model_config = ConfigDict(extra="allow")

    batch: _Count  # optimizer steps done, skipped ones included
    skipped: _Count = 0  # the last steps in a row that were skipped
    metrics_bytes: _Count = 0  # size of metrics.jsonl at that time
    optimizer_steps: dict[str, _Count] = {}  # steps of each trained parameter
    config: _Config  # the resolved config
    base: _Base | None = None  # of adapters; None: the checkpoint holds the whole model
    data: dict[str, str] | None = None  # digests of text and tokenizer; older ones have none
    stop_ids: list[int] | None = None  # of the generation_config.json beside the tokenizer


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON part of a verified checkpoint.

    Raises CheckpointError if a key is missing or has no usable value, and if the folder is named
    after another batch.
    """
    content = read_json(checkpoint / META, error=CheckpointError)
    try:
        meta = _Meta.model_validate(content).model_dump() | {"config": content["config"]}
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"checkpoint {checkpoint}: {key} of {META} is not usable: {first['msg']}; "
            "take another checkpoint"
        ) from None
    named = _NAME.fullmatch(checkpoint.name)
    if named and int(named[1]) != meta["batch"]:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of batch {meta['batch']}, as its {META} says; "
            f"give the folder its name back, ba{meta['batch']}"
        )
    return meta
