"""What a run wrote, without what differs between two equal runs."""

import json
from pathlib import Path

from safetensors.torch import load_file

from tokenyard_train.records.metrics import TIMINGS


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor. The headers of the files have no fixed order."""
    return {
        name: tensor.numpy().tobytes()
        for shard in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
