"""Read a small tensor of a GPU while the GPU has other work."""

from __future__ import annotations

import torch
from torch import Tensor


class LateRead:
    """Reads what a stream had computed at a mark, without a wait for what came after it."""

    def __init__(self) -> None:
        self.marked: torch.cuda.Event | None = None
        self.stream: torch.cuda.Stream | None = None

    def mark(self, tensor: Tensor) -> None:
        """Mark this moment of the tensor's stream. It is all that the host does before the read."""
        if not tensor.is_cuda:
            return
        if self.marked is None:
            self.marked = torch.cuda.Event()
        self.marked.record(torch.cuda.current_stream(tensor.device))

    def read(self, tensor: Tensor) -> list[int]:
        """Return the numbers of a tensor that was computed before the mark."""
        if tensor.is_cuda and self.marked is not None:
            if self.stream is None:
                self.stream = torch.cuda.Stream(tensor.device)
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(self.marked)
                tensor = tensor.to("cpu", non_blocking=True)
            self.stream.synchronize()
        numbers: list[int] = tensor.tolist()
        return numbers
