"""Scoring the held-out text."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch.nn import functional as F

from tokenyard_train.data import IGNORED
from tokenyard_train.engine.setup import Run


@torch.no_grad()
def evaluate(run: Run) -> dict[str, Any]:
    """Return the record of an evaluation: nats per token, and bits per byte of text.

    The sum of nats over all predicted tokens, divided by ln 2 and by the bytes that they stand for; the end of a
    document is predicted like any token and stands for no byte.
    """
    held_out = run.data.held_out
    if held_out is None:
        raise ValueError("evaluate needs held-out data")
    began = time.perf_counter()
    run.model.eval()
    rank, world = run.strategy.data
    nats = torch.zeros((), dtype=torch.float64, device=run.device)
    for first in range(0, len(held_out), world):
        index = first + rank
        inputs, targets = (t.to(run.device) for t in held_out.batch(min(index, len(held_out) - 1)))
        with run.precision():
            logits = run.model(inputs).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        if index < len(
            held_out
        ):  # past the end a rank only takes part, so that the others' tokens find its experts
            nats += losses.double().sum()
    total = run.strategy.reduce(nats).item()
    tokens, size = len(held_out.predicted), run.data.tokenizer.bytes_in(held_out.predicted)
    return {
        "kind": "eval",
        "batch": run.batch,
        "loss": total / tokens,
        "bits_per_byte": total / math.log(2) / size,
        "seconds": round(time.perf_counter() - began, 3),
    }
