"""Keep the inputs of blocks in host memory between the forward and the backward pass.

On a GPU the copies run beside the computation, on a stream of their own. The forward pass copies a
block's input while it computes the block. The backward pass fetches the input of the block before
the one that it computes. So the GPU holds two inputs at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tokenyard import Model


def offload_inputs(model: Model, device: torch.device) -> None:
    """Let each block's input go to the host. Each block must save its input, by recompute.

    On a CPU this is a plain copy, which saves nothing.
    """
    transfers = _Transfers(device)
    for i, block in enumerate(model.blocks):
        block.forward = partial(_offloaded, transfers, i == 0, block.forward)


def _offloaded(
    transfers: _Transfers, first: bool, forward: Callable[..., Any], x: Tensor, *args: Any
) -> Any:
    """Run a block on x [B, S, D]; `first` marks the first block of a forward pass."""
    if not torch.is_grad_enabled():
        return forward(x, *args)
    copies: list[_Offloaded] = []
    # Autograd keeps `pack` until the backward pass, so it must not hold x.
    address = x.data_ptr()
    shape = x.shape

    def pack(tensor: Tensor) -> Any:
        if tensor.data_ptr() != address or tensor.shape != shape:
            return tensor
        if not copies:
            copies.append(transfers.offload(tensor, first))
        return copies[0]

    with saved_tensors_hooks(pack, _unpack):
        return forward(x, *args)


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.fetch() if isinstance(packed, _Offloaded) else packed
    return tensor


class _Offloaded:
    """A block's input in host memory."""

    def __init__(self, tensor: Tensor, transfers: _Transfers, previous: _Offloaded | None):
        self.transfers = transfers
        self.previous = None if previous is None else weakref.ref(previous)
        self.device = tensor.device
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self.left = transfers.copy(tensor, self.host)
        self.arriving: tuple[Tensor, torch.cuda.Event | None] | None = None

    def prefetch(self) -> None:
        """Start to copy the input back."""
        if self.arriving is None:
            tensor = torch.empty_like(self.host, device=self.device)
            self.arriving = tensor, self.transfers.copy(self.host, tensor)

    def fetch(self) -> Tensor:
        """Return the input, and start to fetch that of the block before."""
        self.prefetch()
        assert self.arriving is not None
        tensor, event = self.arriving
        self.arriving = None
        self.transfers.wait(event)
        self.transfers.leaving = None  # the stream copies in order, so this has left
        previous = None if self.previous is None else self.previous()
        if previous is not None:
            previous.prefetch()
        return tensor


class _Transfers:
    """Copies between a device and the host, in order."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.newest: weakref.ref[_Offloaded] | None = None
        # the input that the stream may still read, and when it is copied
        self.leaving: tuple[Tensor, torch.cuda.Event | None] | None = None

    def offload(self, tensor: Tensor, first: bool) -> _Offloaded:
        """Start to copy a block's input to the host; wait for the copy of the block before."""
        if self.leaving is not None:
            self.wait(self.leaving[1])
        previous = None if first or self.newest is None else self.newest()
        offloaded = _Offloaded(tensor.detach(), self, previous)
        self.newest = weakref.ref(offloaded)
        self.leaving = tensor.detach(), offloaded.left
        return offloaded

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Start a copy after all work so far; return the event of its end, None if it has ended."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let later work of the current stream wait for a copy; the host does not wait."""
        if event is not None:
            event.wait()
