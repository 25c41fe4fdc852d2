"""The JSON part of a checkpoint: the run's position and config, with the type of each key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenyard.bounded import read_json
from tokenyard_train.checkpoint.manifest import CheckpointError

META = "run.json"
"""File in a checkpoint: the run's state and config as JSON, everything that is not a tensor."""

_Count = Annotated[int, Field(ge=0, le=10**15, strict=True)]


class _Meta(BaseModel):
    """What a checkpoint must say. Defaults are those of checkpoints without a trained step."""

    model_config = ConfigDict(extra="allow")

    batch: _Count  # optimizer steps done, skipped ones included
    skipped: _Count = 0  # the last steps in a row that were skipped
    metrics_bytes: _Count = 0  # size of metrics.jsonl at that time
    optimizer_steps: dict[str, _Count] = {}  # steps of each trained parameter
    config: dict[str, Any]  # the resolved config
    data: dict[str, str] | None = None  # digests of text and tokenizer; older ones have none


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON part of a verified checkpoint.

    Raises CheckpointError if a key is missing or has no usable value.
    """
    content = read_json(checkpoint / META, error=CheckpointError)
    try:
        return _Meta.model_validate(content).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"checkpoint {checkpoint}: {key} of {META} is not usable: {first['msg']}; "
            "take another checkpoint"
        ) from None
