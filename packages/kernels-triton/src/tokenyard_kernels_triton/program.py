"""A recorded sequence of allocations and launches, and how it runs with other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenyard_kernels_triton.driver_launch import DriverLaunch, driver_launch, has_hooks
from tokenyard_kernels_triton.launching import Launch, current_stream, start


class _View(NamedTuple):
    """A tensor of a program: memory of the tensor in `slot`, in some shape and dtype."""

    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # in elements, from the first one of the tensor in the slot
    dtype: torch.dtype

    @property
    def bytes_before(self) -> int:
        return self.offset * self.dtype.itemsize


class _Allocation(NamedTuple):
    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def whole(self) -> _View:
        return _View(self.slot, self.shape, self.strides, 0, self.dtype)

    def make(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


class _Address(NamedTuple):
    """The part of a tensor that a TMA descriptor reads when its kernel is launched."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _Memory:
    """The tensors of a run, and their addresses, by slot."""

    def __init__(self, inputs: Sequence[Tensor | None], slots: int):
        more = slots - len(inputs)
        self.tensors: list[Any] = [*inputs, *[None] * more]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
        self.addresses = [*addresses, *[0] * more]
        self.device = next(tensor.device for tensor in inputs if tensor is not None)
        self.stream = current_stream(self.device)
        self.hooked = has_hooks()


@dataclass
class _Step:
    """A launch, the tensors to allocate before it and those to free after it."""

    launch: Launch
    allocations: list[_Allocation]
    views: dict[int, _View]  # position of an argument -> its memory
    direct: DriverLaunch | None
    frees: list[int] = field(default_factory=list)

    def run(self, memory: _Memory) -> None:
        tensors, addresses = memory.tensors, memory.addresses
        for allocation in self.allocations:
            tensor = allocation.make(memory.device)
            tensors[allocation.slot] = tensor
            addresses[allocation.slot] = tensor.data_ptr()
        direct = self.direct
        if direct is None or memory.hooked or not direct.start(addresses, memory.stream):
            self._start(memory)
        for slot in self.frees:
            tensors[slot] = None

    def _start(self, memory: _Memory) -> None:
        """Launch by Triton, in the interpreter if that runs kernels."""
        arguments = list(self.launch.arguments)
        interpreted = self.launch.kernel is None
        for position, view in self.views.items():
            if interpreted:
                arguments[position] = _seen_as(memory.tensors[view.slot], view)
                continue
            address = memory.addresses[view.slot] + view.bytes_before
            recorded = arguments[position]
            arguments[position] = address if recorded is None else _moved(recorded, address)
        start(self.launch, arguments, memory.stream)


_Output = int | _View | _Allocation
"""A slot whose tensor it is, a part of that, or an allocation that is empty."""


class Program:
    """A sequence of launches that runs with any tensors of the recorded shapes."""

    def __init__(self, slots: int, steps: list[_Step], outputs: list[_Output]):
        self.slots = slots
        self.steps = steps
        self.outputs = outputs

    def run(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Return the outputs of the recorded function for these inputs."""
        memory = _Memory(inputs, self.slots)
        for step in self.steps:
            step.run(memory)
        tensors = memory.tensors
        return tuple(
            tensors[output] if isinstance(output, int) else _output(output, memory)
            for output in self.outputs
        )


class ProgramBuilder:
    """Collects the allocations and launches of a function while it runs."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        self.inputs = inputs
        self.slots = len(inputs)
        self.steps: list[_Step] = []
        self.pending: list[_Allocation] = []
        # first address of a storage -> slot and first address of the tensor that was last
        # allocated there. It is not kept alive: its memory may become that of another.
        self.allocated: dict[int, tuple[int, int]] = {}

    def allocate(self, tensor: Tensor) -> None:
        """Add the allocation of a tensor."""
        if tensor.numel() == 0:
            return
        allocation = _Allocation(self.slots, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        self.pending.append(allocation)
        self.allocated[tensor.untyped_storage().data_ptr()] = (self.slots, tensor.data_ptr())
        self.slots += 1

    def launch(self, launch: Launch) -> bool:
        """Add a launch. Return False if a tensor is neither an input's memory nor allocated."""
        views: dict[int, _View] = {}
        for position, argument in enumerate(launch.arguments):
            tensor = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
            if not isinstance(tensor, Tensor) or tensor.numel() == 0:
                continue
            view = self._view(tensor)
            if view is None:
                return False
            views[position] = view
        places = {position: (view.slot, view.bytes_before) for position, view in views.items()}
        direct = driver_launch(launch, places)
        self.steps.append(_Step(launch.without_tensors(), self.pending, views, direct))
        self.pending = []
        return True

    def build(self, outputs: Sequence[Tensor]) -> Program | None:
        """Return the program; None if an output is not the memory of a launch's argument."""
        used = {view.slot for step in self.steps for view in step.views.values()}
        allocations = {made.slot: made for step in self.steps for made in step.allocations}
        kept = set(range(len(self.inputs)))
        results: list[_Output] = []
        for output in outputs:
            if output.numel() == 0:
                shape = tuple(output.shape)
                results.append(_Allocation(-1, shape, output.stride(), output.dtype))
                continue
            view = self._view(output)
            if view is None or view.slot not in used:
                return None
            allocation = allocations.get(view.slot)
            whole = allocation is not None and view == allocation.whole()
            results.append(view.slot if whole else view)
            kept.add(view.slot)
        for step in reversed(self.steps):
            step.frees = sorted({view.slot for view in step.views.values()} - kept)
            kept |= set(step.frees)
        return Program(self.slots, self.steps, results)

    def _view(self, tensor: Tensor) -> _View | None:
        place = self._place(tensor)
        if place is None:
            return None
        slot, first = place
        offset = (tensor.data_ptr() - first) // tensor.element_size()
        return _View(slot, tuple(tensor.shape), tensor.stride(), offset, tensor.dtype)

    def _place(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return the slot of the tensor that this one is memory of, and its first address."""
        address = tensor.data_ptr()
        for slot, owner in enumerate(self.inputs):
            if owner is not None and 0 <= address - owner.data_ptr() < owner.nbytes:
                return slot, owner.data_ptr()
        return self.allocated.get(tensor.untyped_storage().data_ptr())


def _output(output: _View | _Allocation, memory: _Memory) -> Tensor:
    if isinstance(output, _Allocation):
        return output.make(memory.device)
    return _seen_as(memory.tensors[output.slot], output)


def _seen_as(tensor: Tensor, view: _View) -> Tensor:
    if tensor.dtype != view.dtype:
        tensor = tensor.view(view.dtype)
    if view.offset == 0 and tensor.shape == view.shape and tensor.stride() == view.strides:
        return tensor
    return tensor.as_strided(view.shape, view.strides, tensor.storage_offset() + view.offset)


def _moved(descriptor: Any, address: int) -> Any:
    """Return a TMA descriptor like this one, of a matrix at another address."""
    moved = object.__new__(type(descriptor))
    moved.__dict__ = descriptor.__dict__ | {"base": _Address(address)}
    return moved
