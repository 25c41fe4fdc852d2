"""What follows the last step of a run: the last checkpoint is verified, and the run summarized."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tokenyard_train.checkpoint import verify
from tokenyard_train.distributed import is_rank0
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.state import Run
from tokenyard_train.engine.summary import summarize

log = logging.getLogger("tokenyard")


class RunResult(NamedTuple):
    """The result of a finished run."""

    folder: Path
    batches: int
    train_loss: float  # of the last step that was taken, nats per token; nan if none was
    bits_per_byte: float | None  # of the held-out text


def finish(run: Run, callbacks: Sequence[Callback]) -> RunResult:
    """Summarize a run whose last step is saved, and end its callbacks.

    Raises CheckpointError if the last checkpoint is missing or damaged.
    """
    folder = run.setup.folder
    verify(folder / f"ba{run.batch}")
    records = run.metrics.read()
    if is_rank0():
        # Imported here: matplotlib takes a second that only the end of a run needs.
        from tokenyard_train.records.plots import expert_heatmap, loss_curve

        softly("loss.png", lambda: loss_curve(records, folder / "loss.png"))
        softly("experts.png", lambda: expert_heatmap(records, folder / "experts.png"))
        softly("the summary", lambda: summarize(run, records))
    for callback in callbacks:
        softly(type(callback).__name__, partial(callback.end, run))
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    scores = [r["bits_per_byte"] for r in records if r["kind"] == "eval"]
    return RunResult(
        folder=folder,
        batches=run.batch,
        train_loss=losses[-1] if losses else math.nan,
        bits_per_byte=scores[-1] if scores else None,
    )


def softly(what: str, call: Callable[[], object]) -> None:
    """Call what follows the last step. The run is trained and saved, so an error is a warning."""
    try:
        call()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        log.warning(
            "%s failed after the last step (%s: %s); the run is trained and saved",
            what,
            type(error).__name__,
            reason,
        )
