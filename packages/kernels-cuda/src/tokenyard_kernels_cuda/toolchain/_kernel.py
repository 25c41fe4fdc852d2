"""Kernels as functions that know what they take: a launch with other arguments is an error, not a wrong result."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenyard_kernels_cuda.toolchain import _driver
from tokenyard_kernels_cuda.toolchain._source import Source

_MOST = {"x": (1 << 31) - 1, "y": (1 << 16) - 1}  # blocks along a dimension of the grid


class Parameter(Protocol):
    """What a kernel takes in one place."""

    ctype: Any

    def value(self, argument: Any) -> Any:
        """Return what is passed on for an argument. Raises TypeError with the fault alone."""
        ...


Parameters = dict[str, Parameter]
"""Parameters by name, in order."""


@dataclass(frozen=True)
class Array:
    """A contiguous tensor of one dtype; the kernel gets its address, null for None where that may be."""

    dtype: torch.dtype
    optional: bool = False
    ctype = ctypes.c_void_p

    def value(self, argument: Any) -> int:
        """Return the address."""
        if argument is None and self.optional:
            return 0
        if not isinstance(argument, Tensor) or argument.dtype != self.dtype:
            given = argument.dtype if isinstance(argument, Tensor) else type(argument).__name__
            raise TypeError(f"is {given}, and must be a tensor of {self.dtype}")
        if not argument.is_contiguous():
            raise TypeError(f"has strides {argument.stride()} and must be contiguous")
        return argument.data_ptr()


@dataclass(frozen=True)
class Int:
    """A 32-bit integer."""

    ctype = ctypes.c_int

    def value(self, argument: Any) -> int:
        """Return it."""
        if not isinstance(argument, int) or not -(1 << 31) <= argument < 1 << 31:
            raise TypeError(f"is {argument!r}, and must be an integer of 32 bits")
        return argument


@dataclass(frozen=True)
class Float:
    """A 32-bit float."""

    ctype = ctypes.c_float

    def value(self, argument: Any) -> float:
        """Return it."""
        if not isinstance(argument, (int, float)):
            raise TypeError(f"is {argument!r}, and must be a number")
        return float(argument)


class Kernel:
    """A kernel of a source, with its parameters by name, in order."""

    def __init__(self, source: Source, name: str, **parameters: Parameter):
        self.source, self.name, self.parameters = source, name, parameters
        self._types = tuple(parameter.ctype for parameter in parameters.values())

    def __call__(
        self, grid: tuple[int, int], threads: int, *arguments: Any, shared: int = 0
    ) -> None:
        """Start it on the current stream of the arguments' GPU: blocks (x, y), threads and bytes of shared memory each.

        Raises TypeError for arguments that it does not take, CompileError and DriverError.
        """
        values = self._values(arguments)
        for (dimension, most), blocks in zip(_MOST.items(), grid):
            if not 0 < blocks <= most:
                raise ValueError(
                    f"{self.name}: {blocks} blocks along {dimension}; there may be 1 to {most}"
                )
        device = next(a.get_device() for a in arguments if isinstance(a, Tensor))
        _driver.launch(
            self.source, self.name, device, (*grid, 1), threads, shared, (values, self._types)
        )

    def _values(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(arguments) != len(self.parameters):
            raise TypeError(
                f"{self.name} takes {len(self.parameters)} arguments, and {len(arguments)} were given"
            )
        devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
        if len(devices) != 1:
            raise TypeError(
                f"{self.name}: tensors are on {len(devices)} devices; they must be on one"
            )
        values = []
        for (name, parameter), argument in zip(self.parameters.items(), arguments):
            try:
                values.append(parameter.value(argument))
            except TypeError as fault:
                raise TypeError(f"{self.name}: {name} {fault}") from None
        return tuple(values)


def compile_kernels(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Compile kernels that were never compiled before, in parallel, and load them on a GPU."""
    _driver.load(dict.fromkeys(kernel.source for kernel in kernels), device.index)
