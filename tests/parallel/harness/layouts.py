"""Layouts of `tokenyard train`, and the call of a function on every rank of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenyard.testing import ranks

# ranks, and the section `parallel` of the config
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp-2": (2, {"strategy": "ddp"}),
    "fsdp-2": (2, {"strategy": "fsdp"}),
    "fsdp-2-copies": (2, {"strategy": {"name": "fsdp", "transfers": "copies"}}),
    "fsdp-2-ep2": (2, {"strategy": "fsdp", "expert_parallel": 2}),
    "ddp-2-ep2": (2, {"strategy": "ddp", "expert_parallel": 2}),
    "fsdp-4-ep2": (4, {"strategy": "fsdp", "expert_parallel": 2}),
    "fsdp-4-ep4": (4, {"strategy": "fsdp", "expert_parallel": 4}),
    "hsdp-4-ep2": (4, {"strategy": {"name": "fsdp", "replicate": 2}, "expert_parallel": 2}),
}
PARALLEL_LAYOUTS = [name for name in LAYOUTS if name != "single"]

Settings = dict[str, Any]


def run(
    function: Callable[..., Any],
    layout: str,
    settings: Settings,
    folder: Path,
    *args: Any,
    **changes: Any,
) -> Any:
    """Call a function of the harness on every rank of a layout; all ranks must return the same.

    Its first argument is the config: `settings`, the layout, a run in `folder`, then `changes`.
    """
    count, parallel = LAYOUTS[layout]
    config = settings | {
        "device_train_microbatch_size": 4 // count,
        "device_eval_batch_size": 2,
        "parallel": parallel,
        "save_folder": str(folder / layout),
    }
    config |= changes
    if count == 1:
        return function(config, *args)
    first, *others = ranks(count).run(function, config, *args)
    assert all(other == first for other in others), "ranks disagree"
    return first


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of a kind in a run's metrics.jsonl."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]
