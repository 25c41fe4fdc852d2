"""Saving a run's checkpoints, one at a time, before training goes on or while it does."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from tokenyard_train.checkpoint import write_checkpoint
from tokenyard_train.checkpoint.staging import stage
from tokenyard_train.distributed import group_of_writers


class Saver:
    """Writes the checkpoints of a run's folder.

    With `behind` what this process holds is copied into the host's memory, and a thread writes it while training on
    `device` goes on. Every process of a run calls the same methods in the same order.
    """

    def __init__(self, folder: Path, keep: int, behind: bool, device: torch.device):
        self._folder, self._keep, self._behind, self._device = folder, keep, behind, device
        self._group = group_of_writers() if behind else None
        self._writing: _Writing | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way is known to have failed here; `finish` says how."""
        return self._writing is not None and self._writing.error is not None

    def save(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Save tensors and JSON as a checkpoint of that name; `finish` tells when it is whole. Call that before."""
        if self._writing is not None:
            raise RuntimeError("finish the checkpoint before first")
        copies = stage(tensors) if self._behind else tensors
        self._writing = _Writing(
            self._device, self._folder, name, copies, meta, self._keep, self._group
        )
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
        if writing.path is None:
            raise RuntimeError(
                "the thread that writes checkpoints ended without a checkpoint and without an error"
            )
        return writing.path


class _Writing(Thread):
    """One checkpoint being written; a process that ends for another reason does not wait for it."""

    def __init__(self, device: torch.device, *args: Any):
        super().__init__(daemon=True)
        self._device, self._args = device, args
        self.path: Path | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Write it. Whatever goes wrong is kept for `Saver.finish`, which raises it in the training thread."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(
                    self._device
                )  # a new thread starts on cuda:0, which another rank may use
            self.path = write_checkpoint(*self._args)
        except BaseException as error:
            self.error = error
