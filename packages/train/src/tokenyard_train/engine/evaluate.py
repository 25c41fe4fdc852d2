"""Scoring the held-out text."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from tokenyard import Targets, TokenLoss
from tokenyard_train.engine.setup import Setup


@torch.no_grad()
def evaluate(setup: Setup, batch: int, kind: str = "eval") -> dict[str, Any]:
    """Return the record of an evaluation after `batch` steps: nats per token, bits per byte.

    `kind` names the held-out set, see ``Data.held_out_sets``.

    Bits per byte are the sum of nats over all predicted tokens, divided by ln 2 and by the bytes
    that these tokens encode. The end of a document is predicted as any token and encodes no byte.
    """
    held_out = setup.data.held_out_sets()[kind]
    began = time.perf_counter()
    setup.model.eval()
    rank, world = setup.strategy.data
    nats = torch.zeros((), dtype=torch.float64, device=setup.device)
    for first in range(0, len(held_out), world):
        index = first + rank
        rows = held_out.batch(min(index, len(held_out) - 1)).to(setup.device)
        packed = {} if rows.documents is None else {"documents": rows.documents}
        with setup.precision():
            loss: TokenLoss = setup.model(rows.ids, targets=Targets(rows.targets), **packed)
        # Past the end a rank only takes part: other ranks' tokens need its experts.
        if index < len(held_out):
            nats += loss.nats
    total = setup.strategy.reduce(nats).item()
    tokens = len(held_out.predicted)
    size = setup.data.tokenizer.bytes_in(held_out.predicted)
    return {
        "kind": kind,
        "batch": batch,
        "loss": total / tokens,
        "bits_per_byte": total / math.log(2) / size,
        "seconds": round(time.perf_counter() - began, 3),
    }
