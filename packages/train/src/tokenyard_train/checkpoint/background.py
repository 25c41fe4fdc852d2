"""Save a run's checkpoints one at a time, in the training thread or in a background thread."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from tokenyard_train.checkpoint import write_checkpoint
from tokenyard_train.checkpoint.staging import stage
from tokenyard_train.distributed import cpu_group


class BackgroundWriter:
    """Writes checkpoints to a run's folder.

    With `background`, a save copies this rank's tensors to host memory. A thread writes the copies
    while training on `device` continues. All ranks call the same methods in the same order.
    """

    def __init__(self, folder: Path, keep: int, background: bool, device: torch.device):
        self._folder = folder
        self._keep = keep
        self._background = background
        self._device = device
        self._group = cpu_group() if background else None
        self._thread: _WriteThread | None = None

    @property
    def failed(self) -> bool:
        """Whether writing the current checkpoint has failed on this rank; `finish` raises why."""
        return self._thread is not None and self._thread.error is not None

    def save(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Start writing tensors and JSON as checkpoint `name`.

        Call `finish` before the next save. Raises RuntimeError without it.
        """
        if self._thread is not None:
            raise RuntimeError("finish the checkpoint before first")
        copies = stage(tensors) if self._background else tensors
        self._thread = _WriteThread(
            self._device, self._folder, name, copies, meta, self._keep, self._group
        )
        if self._background:
            self._thread.start()
        else:
            self._thread.run()

    def finish(self) -> Path | None:
        """Wait for the current checkpoint and return its path; None if there is none.

        Raises the error of a save that failed.
        """
        thread = self._thread
        self._thread = None
        if thread is None:
            return None
        if self._background:
            thread.join()
        if thread.error is not None:
            raise thread.error
        if thread.path is None:
            raise RuntimeError(
                "the thread that writes checkpoints ended without a checkpoint and without an error"
            )
        return thread.path


class _WriteThread(Thread):
    """Writes one checkpoint. A daemon: a process that fails does not wait for it."""

    def __init__(self, device: torch.device, *args: Any):
        super().__init__(daemon=True)
        self._device = device
        self._args = args
        self.path: Path | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Write the checkpoint. Keep any error for `finish`, which raises it in the main thread."""
        try:
            if self._device.type == "cuda":
                # A new thread defaults to cuda:0, which another rank may use.
                torch.cuda.set_device(self._device)
            self.path = write_checkpoint(*self._args)
        except BaseException as error:
            self.error = error
