"""Weights & Biases, offline unless the config says otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from tokenyard_train.config.loggers import WandbLogger
from tokenyard_train.optional import needs
from tokenyard_train.records.trackers._build import Place


class WandbTracker:
    """Logs into a run of W&B, which keeps its id when the run is resumed.

    Offline it is written into ``wandb`` in the run's folder, for ``wandb sync``.
    """

    def __init__(self, options: WandbLogger, place: Place):
        wandb = needs("wandb", "loggers.wandb", "tokenyard-train[wandb]")
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            name=options.name or place.run_name,
            tags=options.tags,
            id=place.identities.get("wandb"),
            resume="allow" if "wandb" in place.identities and options.mode == "online" else None,
            mode=options.mode,
            dir=str(place.folder),
            config=dict(place.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        place.identities["wandb"] = self._run.id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers."""
        self._run.log(dict(numbers), step=step)

    def finish(self, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=1 if failed else 0)
