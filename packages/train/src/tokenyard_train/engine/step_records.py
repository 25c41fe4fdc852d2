"""The records of a step, taken or skipped, in metrics.jsonl."""

from __future__ import annotations

import time
from typing import Any

from tokenyard.devices import peak_memory
from tokenyard.peer_memory import shared_bytes
from tokenyard_train.engine.nonfinite import Skipped
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.step_result import StepResult


class Clock:
    """Estimates the time that is left, from the pace since the run began or resumed."""

    def __init__(self, batch: int):
        self.batch = batch
        self.began = time.perf_counter()

    def remaining(self, batch: int, batches: int) -> float:
        """Return the seconds from step `batch` to the last, evaluations and saves included."""
        return (time.perf_counter() - self.began) / (batch - self.batch) * (batches - batch)


def train_record(
    setup: Setup, batch: int, result: StepResult, seconds: float, remaining: float
) -> dict[str, Any]:
    """Return the record of the training step that ended at `batch` and took `seconds`.

    `remaining` is the time to the end of the run. On a GPU, `peak_bytes` is the most that torch has
    held there since the process began, and buffers that ranks share.
    """
    memory = {}
    if setup.device.type == "cuda":
        memory = {"peak_bytes": peak_memory(setup.device) + shared_bytes(setup.device)}
    speed = setup.batch_tokens / seconds
    return {
        "kind": "train",
        "batch": batch,
        "tokens": batch * setup.batch_tokens,
        **result._asdict(),
        "seconds": round(seconds, 4),
        "tokens_per_s": round(speed),
        "flops_per_s": speed * setup.flops_per_token,
        "remaining_s": round(remaining, 1),
        **memory,
    }


def skipped_record(batch: int, step: Skipped) -> dict[str, Any]:
    """Return the record of a step that was not taken. Numbers are text: JSON has no nan and inf."""
    return {
        "kind": "skipped",
        "batch": batch,
        "loss": str(step.loss),
        "grad_norm": str(step.grad_norm),
    }
