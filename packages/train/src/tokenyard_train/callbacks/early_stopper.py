"""Stop a run whose held-out loss has not improved for a while, as Composer's EarlyStopper does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tokenyard import ConfigError, Model
from tokenyard_train.config.callbacks import EarlyStopperConfig
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data
from tokenyard_train.distributed import on_rank0
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.run_length import epoch_batches
from tokenyard_train.engine.state import Run


class EarlyStopper(Callback):
    """Ends the run when `patience` has passed since the best score.

    It reads the scores in metrics.jsonl, so a resumed run counts on.
    """

    def __init__(self, config: EarlyStopperConfig):
        self.config = config
        label = config.dataloader_label
        self.kind = label if label == "eval" else f"eval/{label}"

    def check(self, config: TrainConfig, model: Model, data: Data) -> None:
        """Raise ConfigError for a label that no held-out text has."""
        kinds = data.held_out_sets()
        if self.kind not in kinds:
            known = ", ".join(kind.removeprefix("eval/") for kind in kinds) or "none"
            raise ConfigError(
                f"callbacks.early_stopper.dataloader_label is {self.config.dataloader_label!r}, "
                f"and the labels of held-out text are: {known}; give one of them, or eval_loader"
            )

    def evaluated(self, run: Run, record: Mapping[str, Any]) -> None:
        """Stop the run if the best score is too old."""
        if record["kind"] != self.kind:
            return
        epoch = epoch_batches(run.setup.config, run.setup.data)
        if on_rank0(lambda: self._is_late(run.metrics.read(), epoch)):
            run.stop_training()

    def _is_late(self, records: Iterable[Mapping[str, Any]], epoch: int) -> bool:
        best = math.inf
        best_batch = 0
        batch = 0
        for record in records:
            if record["kind"] != self.kind:
                continue
            batch = record["batch"]
            score = self._score(record)
            # Composer's rule: better, and by more than min_delta
            if best == math.inf or best - score > self.config.min_delta:
                best = score
                best_batch = batch
        patience = self.config.patience
        if patience.unit == "ep":
            return batch // epoch - best_batch // epoch > patience.value
        return batch - best_batch > patience.value

    def _score(self, record: Mapping[str, Any]) -> float:
        if self.config.monitor == "LanguagePerplexity":
            return math.exp(min(record["loss"], 700.0))
        key = "bits_per_byte" if self.config.monitor == "bits_per_byte" else "loss"
        return float(record[key])
