"""Launch a compiled Triton kernel by the CUDA driver, without Triton's launcher.

Triton's launcher converts each argument of a launch, and looks for memory to allocate and hooks to
call. Here numbers are converted once, and a launch only writes its addresses between them.
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

from tokenyard.cuda_driver import has_driver, launch_kernel
from tokenyard_kernels_triton.launching import Launch

_CODES = {"i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f"}
"""The codes of the module struct for the types of numbers; all others are left to Triton."""

_BITS = re.compile(r"\.param\s+\.[a-z]+(\d+)")  # of a kernel's parameter in PTX


@dataclass(frozen=True)
class DriverLaunch:
    """A launch whose numbers are fixed, and whose tensors have other addresses each time."""

    function: ctypes.c_void_p
    sizes: tuple[int, ...]  # grid, threads of a block, and bytes of shared memory
    layout: Struct  # of the arguments
    arguments: list[Any]  # with 0 for each address
    addresses: tuple[tuple[int, int, int], ...]  # position, slot of the tensor, bytes after it
    chained: bool

    def start(self, addresses: Sequence[int], stream: int) -> bool:
        """Launch with the addresses of all slots. Return whether the driver accepted that."""
        if _has_hooks():  # Triton's launcher calls them
            return False
        arguments = self.arguments.copy()
        for position, slot, offset in self.addresses:
            arguments[position] = addresses[slot] + offset
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
    types = kernel.src.signature.values()
    codes: list[str] = []
    values: list[Any] = []
    moved: list[tuple[int, int, int]] = []
    for position, (kind, argument) in enumerate(zip(types, launch.arguments, strict=True)):
        if kind == "constexpr":
            continue
        if position in addresses:
            moved.append((len(values), *addresses[position]))
        codes.append("P" if kind.startswith("*") else _CODES.get(kind, ""))
        values.append(0 if kind.startswith("*") else argument)  # also of an empty tensor
    if not _has_layout(kernel, codes):
        return None
    return DriverLaunch(
        ctypes.c_void_p(kernel.function),
        (*launch.grid, 32 * metadata.num_warps, 1, 1, metadata.shared),
        Struct("@" + "".join(codes) + "PP"),  # two addresses of scratch memory, which is unused
        [*values, 0, 0],
        tuple(moved),
        bool(metadata.launch_pdl),
    )


def _has_layout(kernel: Any, codes: Sequence[str]) -> bool:
    """Return whether a kernel's parameters are those, and two addresses, as in Triton 3.6."""
    _, _, entry = kernel.asm["ptx"].partition(".entry")
    bits = [int(number) for number in _BITS.findall(entry.partition(")")[0])]
    return bits == [8 * Struct(code).size for code in (*codes, "P", "P")]


def _has_hooks() -> bool:
    """Return whether functions must be called around launches."""
    hooks = triton.knobs.runtime
    enter = hooks.launch_enter_hook
    leave = hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
