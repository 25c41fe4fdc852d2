"""The records of a step, taken or skipped, in metrics.jsonl."""

from __future__ import annotations

from typing import Any

from tokenyard_train.engine.nonfinite import Skipped
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.step import StepResult


def train_record(setup: Setup, batch: int, result: StepResult, seconds: float) -> dict[str, Any]:
    """Return the record of the training step that ended at `batch` and took `seconds`."""
    speed = setup.batch_tokens / seconds
    return {
        "kind": "train",
        "batch": batch,
        "tokens": batch * setup.batch_tokens,
        **result._asdict(),
        "seconds": round(seconds, 4),
        "tokens_per_s": round(speed),
        "flops_per_s": speed * setup.flops_per_token,
    }


def skipped_record(batch: int, step: Skipped) -> dict[str, Any]:
    """Return the record of a step that was not taken. Numbers are text: JSON has no nan and inf."""
    return {
        "kind": "skipped",
        "batch": batch,
        "loss": str(step.loss),
        "grad_norm": str(step.grad_norm),
    }
