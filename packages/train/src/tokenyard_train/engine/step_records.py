"""What a run writes down of a step."""

from __future__ import annotations

from typing import Any

from tokenyard_train.engine.nonfinite import Skipped
from tokenyard_train.engine.setup import Run
from tokenyard_train.engine.step import StepResult


def train_record(run: Run, result: StepResult, seconds: float) -> dict[str, Any]:
    """Return the record of a training step that took so many seconds."""
    speed = run.batch_tokens / seconds
    record = {
        "kind": "train",
        "batch": run.batch,
        "tokens": run.batch * run.batch_tokens,
        **result._asdict(),
    }
    return record | {
        "seconds": round(seconds, 4),
        "tokens_per_s": round(speed),
        "flops_per_s": speed * run.flops_per_token,
    }


def skipped_record(run: Run, step: Skipped) -> dict[str, Any]:
    """Return the record of a step that was not taken; JSON has no numbers for nan and inf."""
    return {
        "kind": "skipped",
        "batch": run.batch,
        "loss": str(step.loss),
        "grad_norm": str(step.grad_norm),
    }
