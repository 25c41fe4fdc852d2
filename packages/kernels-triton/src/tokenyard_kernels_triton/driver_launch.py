"""Launch a compiled Triton kernel by the CUDA driver, without Triton's launcher.

Triton's launcher converts each argument of a launch, encodes its TMA descriptors, and looks for
memory to allocate and hooks to call. Here numbers are converted once, and a launch only writes its
addresses between them, and the descriptors of these addresses (``tensor_map``).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

import torch
import triton

from tokenyard.cuda_driver import MOST_ARGUMENTS, argument_layout, has_driver, launch_kernel
from tokenyard_kernels_triton.launching import Launch
from tokenyard_kernels_triton.tensor_map import BYTES, TensorMap, tensor_map

_CODES = {"i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f"}
"""The codes of the module struct for the types of numbers; all others are left to Triton."""

_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)[^,\[]*(?:\[(\d+)\])?")
"""A kernel's parameter in PTX: the bits of its type, and the elements of an array."""


@dataclass(frozen=True)
class DriverLaunch:
    """A launch whose numbers are fixed, and whose tensors have other addresses each time."""

    function: ctypes.c_void_p
    sizes: tuple[int, ...]  # grid, threads of a block, and bytes of shared memory
    layout: Struct  # of the arguments
    arguments: list[Any]  # with 0 for each address
    addresses: tuple[tuple[int, int, int], ...]  # position, slot of the tensor, bytes after it
    chained: bool
    maps: tuple[tuple[int, int, int, TensorMap], ...] = ()  # the same, and a TMA descriptor

    def start(self, addresses: Sequence[int], stream: int) -> bool:
        """Launch with the addresses of all slots. Return whether the driver accepted that.

        If there are hooks (`has_hooks`), leave the launch to Triton.
        """
        arguments = self.arguments.copy()
        for position, slot, offset in self.addresses:
            arguments[position] = addresses[slot] + offset
        for position, slot, offset, descriptor in self.maps:
            encoded = descriptor.at(addresses[slot] + offset)
            if encoded is None:
                return False
            arguments[position] = encoded
        result = launch_kernel(
            self.function, self.sizes, stream, self.layout, arguments, self.chained
        )
        return result == 0


def driver_launch(launch: Launch, addresses: Mapping[int, tuple[int, int]]) -> DriverLaunch | None:
    """Return a recorded launch; None if only Triton's launcher can repeat it.

    `addresses` maps the position of an argument to the slot of its tensor and the bytes after it.
    """
    kernel = launch.kernel
    if kernel is None or torch.version.hip is not None or not has_driver():
        return None
    metadata = kernel.metadata
    plain = (
        metadata.num_ctas == 1
        and not metadata.launch_cooperative_grid
        and metadata.global_scratch_size == metadata.profile_scratch_size == 0
    )
    if not plain:
        return None
    parameters = _Parameters()
    boxes = iter(getattr(metadata, "tensordesc_meta", None) or ())
    types = kernel.src.signature.values()
    for position, (kind, argument) in enumerate(zip(types, launch.arguments, strict=True)):
        address = addresses.get(position)
        if kind.startswith("tensordesc"):
            if not parameters.add_descriptor(argument, next(boxes, None), address):
                return None
        elif kind != "constexpr":
            parameters.add(kind, argument, address)
    parameters.add("*scratch", 0, None)  # two addresses of scratch memory, which is unused
    parameters.add("*scratch", 0, None)
    if not parameters.are_those_of(kernel):
        return None
    return DriverLaunch(
        ctypes.c_void_p(kernel.function),
        (*launch.grid, 32 * metadata.num_warps, 1, 1, metadata.shared),
        argument_layout(parameters.codes),
        parameters.values,
        tuple(parameters.addresses),
        bool(metadata.launch_pdl),
        tuple(parameters.maps),
    )


class _Parameters:
    """The parameters of a kernel, as Triton 3.6 orders them."""

    def __init__(self) -> None:
        self.codes: list[str] = []
        self.values: list[Any] = []
        self.addresses: list[tuple[int, int, int]] = []
        self.maps: list[tuple[int, int, int, TensorMap]] = []

    def add(self, kind: str, argument: Any, address: tuple[int, int] | None) -> None:
        """Add a number, or a pointer to the tensor in a slot and the bytes after it."""
        pointer = kind.startswith("*")
        if address is not None:
            self.addresses.append((len(self.values), *address))
        # a pointer without an address is that of an empty tensor
        self._append("P" if pointer else _CODES.get(kind, ""), 0 if pointer else argument)

    def add_descriptor(
        self, descriptor: Any, box: Mapping[str, Any] | None, address: tuple[int, int] | None
    ) -> bool:
        """Add a TMA descriptor, its shape and its strides. Return whether that is possible."""
        encoded = None if box is None or address is None else tensor_map(descriptor, box)
        if encoded is None or address is None:
            return False
        self.maps.append((len(self.values), *address, encoded))
        self._append(f"{BYTES}s", b"")
        for number in descriptor.shape:
            self._append("i", number)
        for number in descriptor.strides:
            self._append("q", number)
        return True

    def are_those_of(self, kernel: Any) -> bool:
        """Return whether a kernel's parameters in PTX have these sizes."""
        _, _, entry = kernel.asm["ptx"].partition(".entry")
        declared = _PARAMETER.findall(entry.partition(")")[0])
        sizes = [int(bits) * int(count or 1) // 8 for bits, count in declared]
        return len(sizes) <= MOST_ARGUMENTS and sizes == self.sizes

    @property
    def sizes(self) -> list[int]:
        """The bytes of each parameter."""
        return [Struct(code).size for code in self.codes]

    def _append(self, code: str, value: Any) -> None:
        self.codes.append(code)
        self.values.append(value)


def has_hooks() -> bool:
    """Return whether functions must be called around launches, which Triton's launcher does."""
    hooks = triton.knobs.runtime
    enter = hooks.launch_enter_hook
    leave = hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
