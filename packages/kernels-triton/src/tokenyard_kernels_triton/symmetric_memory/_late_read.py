"""Read a small tensor of a GPU while the GPU has other work."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_SPIN = 0.01  # seconds without a pause between two polls
_PAUSE = 0.001  # seconds


class LateRead:
    """Reads what a stream had computed at a mark, without a wait for what came after it.

    `timeout` is how many seconds a read may wait for other ranks.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.marked: torch.cuda.Event | None = None
        self.copied: torch.cuda.Event | None = None
        self.stream: torch.cuda.Stream | None = None

    def mark(self, tensor: torch.Tensor) -> None:
        """Mark this moment of the tensor's stream. It is all that the host does before the read."""
        if not tensor.is_cuda:
            return
        if self.marked is None:
            self.marked = torch.cuda.Event()
        self.marked.record(torch.cuda.current_stream(tensor.device))

    def read(self, tensor: torch.Tensor) -> list[int]:
        """Return the numbers of a tensor that was computed before the mark.

        Raises DistBackendError after the timeout.
        """
        if tensor.is_cuda and self.marked is not None:
            if self.stream is None or self.copied is None:
                self.stream = torch.cuda.Stream(tensor.device)
                self.copied = torch.cuda.Event()
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(self.marked)
                tensor = tensor.to("cpu", non_blocking=True)
                self.copied.record(self.stream)
            wait_for_tokens(self.copied.query, self.timeout)
        numbers: list[int] = tensor.tolist()
        return numbers


def wait_for_tokens(arrived: Callable[[], bool], timeout: float) -> None:
    """Poll until the tokens of all ranks have arrived. Other threads may run meanwhile.

    CUDA has no wait with a timeout. Raises DistBackendError after `timeout` seconds: the stream
    waits for a rank that hangs.
    """
    began = time.monotonic()
    while not arrived():
        waited = time.monotonic() - began
        if waited > timeout:
            raise dist.DistBackendError(
                f"the tokens of all ranks did not arrive in {timeout:g} seconds"
            )
        time.sleep(0 if waited < _SPIN else _PAUSE)
