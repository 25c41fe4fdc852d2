"""Saving a run's checkpoints, one at a time, before training goes on or while it does."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from tokenyard_train.checkpoint import write_checkpoint
from tokenyard_train.together import group_of_writers


class Saver:
    """Writes the checkpoints of a run's folder.

    With `behind` the tensors are copied into the host's memory, which is kept for the next time, and a thread writes
    them while training goes on. Every process of a run calls the same methods in the same order.
    """

    def __init__(self, folder: Path, keep: int, behind: bool):
        self._folder, self._keep, self._behind = folder, keep, behind
        self._stager = DefaultStager(StagingOptions(False, False, False, False)) if behind else None
        self._group = group_of_writers() if behind else None
        self._writing: _Writing | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way is known to have failed here; `finish` says how."""
        return self._writing is not None and self._writing.error is not None

    def save(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Save tensors and JSON as a checkpoint of that name; `finish` tells when it is whole. Call that before."""
        assert self._writing is None, "the checkpoint before is not finished"
        copies = tensors if self._stager is None else self._stager.stage(tensors)
        self._writing = _Writing(self._folder, name, copies, meta, self._keep, self._group)
        if self._behind:
            self._writing.start()
        else:
            self._writing.run()

    def finish(self) -> Path | None:
        """Wait for the checkpoint under way, and return it; None if there is none. Raises what saving it raised."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        if self._behind:
            writing.join()
        if writing.error is not None:
            raise writing.error
        return writing.path


class _Writing(Thread):
    """One checkpoint being written; a process that ends for another reason does not wait for it."""

    def __init__(self, *args: Any):
        super().__init__(daemon=True)
        self._args = args
        self.path: Path | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Write it."""
        try:
            self.path = write_checkpoint(*self._args)
        except Exception as error:
            self.error = error
